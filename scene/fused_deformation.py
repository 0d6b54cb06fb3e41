"""The deformation on a GPU: forward and backward as a handful of Triton kernels (deformation_kernels.py) that keep everything
between a surfel and its deformed attributes on chip. Op by op the same network moves about 109 GB a step of 16 frames and 50k
surfels, here under 3.

The reference, and the path of CPUs, is the plain torch of deformation.py; `fused_network` there says when this one runs.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from scene import deformation_kernels as kernels

PRODUCTS = torch.bfloat16  # what matrix products multiply
LARGEST = 128  # padded width of the model and of the layer's hidden tensor: wider ones do not fit on chip
# rows of a tile, warps, loads in flight (H100)
TILES = {"forward": (64, 4, 3), "gather": (64, 4, 1), "heads_backward": (64, 4, 3), "weights_backward": (128, 8, 3),
         "layer_backward": (64, 4, 1)}  # fmt: skip


def holds(deformation, device: torch.device) -> bool:
    """Whether the kernels can run this network on the device: one attention layer, no active dropout, not too wide."""
    layer = deformation.attention[0]
    dropout = layer.dropout.p > 0 and deformation.training
    fits = layer.query.in_features <= _on_chip(device)[1] and layer.hidden[0].out_features <= LARGEST
    return len(deformation.attention) == 1 and not dropout and fits


def _on_chip(device: torch.device) -> tuple[int, int]:
    """Most rows of a tile of `layer_backward`, which needs the most memory, and widest model that fit on chip.

    By the sizes that Triton's compiler reports; a processor has 227 KiB (H100), 163 (A100) or 99 (GeForce RTX 30 and 40).
    """
    kib = torch.cuda.get_device_properties(device).shared_memory_per_block_optin / 1024 if device.type == "cuda" else 227
    return (64, LARGEST) if kib >= 180 else (64, 64) if kib >= 125 else (32, 64)


def _power(size: int) -> int:
    """The least power of two that holds `size` and fills a matrix instruction."""
    return max(16, triton.next_power_of_2(size))


def _padded(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`x` in the first corner of zeros of `shape`, contiguous."""
    dtype = dtype or PRODUCTS
    if x.shape == shape:
        return x.to(dtype).contiguous()
    out = torch.zeros(shape, dtype=dtype, device=x.device)
    out[tuple(slice(n) for n in x.shape)] = x
    return out


def _corner(x: Tensor, like: Tensor) -> Tensor:
    """Undo `_padded`."""
    return x[tuple(slice(n) for n in like.shape)]


@dataclasses.dataclass
class Network:
    """Weights as the kernels read them. `first` and `last` hold the layers of all heads, `last` (O, U) block-diagonal."""

    norms: Tensor  # (4, D) weight and bias of either norm
    w1: Tensor  # (F, D)
    b1: Tensor
    w2: Tensor  # (D, F)
    b2: Tensor
    first: Tensor  # (U, D)
    first_bias: Tensor
    last: Tensor  # (O, U)

    @classmethod
    def of(cls, norms, w1, b1, w2, b2, first, first_bias, last) -> Network:
        width, hidden, units = _power(w1.shape[1]), _power(w1.shape[0]), len(first)
        block = min(_power(units), LARGEST)
        units = triton.cdiv(units, block) * block
        single = torch.float32
        return cls(_padded(norms, 4, width, dtype=single), _padded(w1, hidden, width), _padded(b1, hidden, dtype=single),
                   _padded(w2, width, hidden), _padded(b2, width, dtype=single), _padded(first, units, width),
                   _padded(first_bias, units, dtype=single), _padded(last, _power(len(last)), units))  # fmt: skip

    def sizes(self) -> dict[str, int]:
        block = min(len(self.first), LARGEST)
        return {"D": self.w1.shape[1], "F": len(self.w1), "W": block, "BLOCKS": len(self.first) // block, "O": len(self.last)}


def _token_sizes(keys: Tensor) -> dict[str, int]:
    heads, tokens = keys.shape[1:3]
    tokens_padded = triton.next_power_of_2(tokens)
    return {"HEADS": heads, "TOKENS": tokens, "TOKENS_PADDED": tokens_padded,
            "HEADS_PADDED": max(triton.next_power_of_2(heads), 16 // tokens_padded)}  # fmt: skip


def _pick(sizes: dict[str, int], *names: str) -> dict[str, int]:
    return {name: sizes[name] for name in names}


def _launch(name: str, grid, *tensors, **sizes) -> None:
    rows, warps, stages = TILES[name]
    kernel = getattr(kernels, name)
    sizes = {"ROWS": rows} | sizes | ({"STAGES": stages} if "STAGES" in kernel.arg_names else {})
    kernel[grid](*tensors, **sizes, num_warps=warps)


def _pad_tokens(keys: Tensor, biases: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    padded = _token_sizes(keys)
    padded = len(keys), padded["HEADS_PADDED"], padded["TOKENS_PADDED"]
    return _padded(keys, *padded, width), _padded(biases, *padded, dtype=torch.float32), _padded(values, *padded, width)


def run_forward(features: Tensor, tokens: tuple[Tensor, Tensor, Tensor], network: Network, base: Tensor,
                sizes: dict[str, int], keep: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:  # fmt: skip
    """Deformed attributes (B, N, size) each, attention (B, N, T) and, with `keep`, what the backward needs (B, N, D).

    features (N, d); keys, biases and values of the tokens (TokenAttention.project), the bias of the output projection in the
    values; base (N, sum of sizes) is added to the residuals.
    """
    (count, width), (batch, _, kinds, _) = features.shape, tokens[0].shape
    sizes_of = network.sizes() | _token_sizes(tokens[0])
    outputs = {name: base.new_empty(batch, count, size) for name, size in sizes.items()}
    attention = base.new_empty(batch, count, kinds)
    hidden = base.new_empty(batch if keep else 0, count, sizes_of["D"], dtype=PRODUCTS)
    n = network
    with torch.cuda.device_of(features):
        _launch("forward", (triton.cdiv(count, TILES["forward"][0]),), features, *_pad_tokens(*tokens, sizes_of["D"]), n.norms,
                n.w1, n.b1, n.w2, n.b2, n.first, n.first_bias, n.last, base, tuple(outputs.values()), attention, hidden, count,
                batch, **sizes_of, WIDTH=width, SIZES=tuple(sizes.values()), KEEP=keep)  # fmt: skip
    return outputs, attention, hidden


class _Deform(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sizes, keep, features, keys, biases, values, base, *weights):
        features, base, network = features.contiguous(), base.contiguous(), Network.of(*weights)
        outputs, attention, hidden = run_forward(features, (keys, biases, values), network, base, sizes, keep)
        ctx.sizes, ctx.network = tuple(sizes.values()), network
        ctx.save_for_backward(features, keys, biases, values, hidden, *weights)
        return *outputs.values(), attention

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        features, keys, biases, values, hidden, *weights = ctx.saved_tensors
        n, sizes = ctx.network, ctx.network.sizes() | _token_sizes(keys)
        (count, width), batch = features.shape, len(keys)
        gradients, attention_gradient = tuple(g.contiguous() for g in gradients[:-1]), gradients[-1].contiguous()
        rows, D = batch * count, sizes["D"]
        block = _pick(sizes, "D", "W", "O")
        with torch.cuda.device_of(features):
            packed = hidden.new_empty(batch, count, sizes["O"])
            d_base = features.new_empty(count, sum(ctx.sizes))
            _launch("gather", (triton.cdiv(count, TILES["gather"][0]),), gradients, packed, d_base, count, batch, O=sizes["O"],
                    SIZES=ctx.sizes)  # fmt: skip
            d_hidden = torch.empty_like(hidden)
            _launch("heads_backward", (triton.cdiv(rows, TILES["heads_backward"][0]),), hidden, packed, n.first, n.first_bias,
                    n.last, d_hidden, rows, BLOCKS=sizes["BLOCKS"], **block)  # fmt: skip
            d_first, d_first_bias, d_last = _weights_backward(hidden, packed, n.first, n.first_bias, n.last, sizes["W"])
            del packed
            tile = min(TILES["layer_backward"][0], _on_chip(features.device)[0])
            tiles = triton.cdiv(count, tile)
            tokens = _pad_tokens(keys, biases, values, D)
            pairs = keys.shape[1], tokens[1].shape[2]  # of a head and a token, these padded
            d_features = torch.empty_like(features)
            d_scores = hidden.new_empty(count, batch, *pairs)
            d_values = features.new_empty(tiles, batch, *pairs, D)
            parts = tiles, batch, tile // 16, D
            d_norms, d_b2 = features.new_empty(*parts, 4), features.new_empty(parts)
            inputs, d_outputs = torch.empty_like(hidden), torch.empty_like(hidden)
            _launch("layer_backward", (tiles,), features, *tokens, n.norms, n.w1, n.b1, n.w2, n.b2, d_hidden, attention_gradient,
                    d_features, d_scores, d_values, d_norms, d_b2, inputs, d_outputs, count, batch, ROWS=tile,
                    **_token_sizes(keys), **_pick(sizes, "D", "F"), WIDTH=width)  # fmt: skip
            d_w1, d_b1, d_w2 = _weights_backward(inputs, d_outputs, n.w1, n.b1, n.w2, sizes["F"])
        d_keys = (d_scores.flatten(1).T @ features.to(PRODUCTS)).float().view(batch, *pairs, width)
        d_biases = d_scores.sum(0, dtype=torch.float32)
        d_weights = d_norms.sum((0, 1, 2)).T, d_w1, d_b1, d_w2, d_b2.sum((0, 1, 2)), d_first, d_first_bias, d_last
        d_tokens = _corner(d_keys, keys), _corner(d_biases, biases), _corner(d_values.sum(0), values)
        return (None, None, d_features, *d_tokens, d_base,
                *(_corner(gradient, weight) for gradient, weight in zip(d_weights, weights, strict=True)))  # fmt: skip


def _weights_backward(x: Tensor, gradient: Tensor, first: Tensor, bias: Tensor, last: Tensor, block: int) -> tuple[Tensor, ...]:
    """Gradients of first (U, D), its bias and last (O, U) of last(relu(first(x))), in pieces of `block` of the U units."""
    units, outputs = first.shape[0], len(last)
    blocks = units // block
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    parts = max(1, processors * 8 // TILES["weights_backward"][1] // blocks)  # 8 warps fill a processor
    d_first = x.new_empty(parts, *first.shape, dtype=torch.float32)
    d_bias = d_first.new_empty(parts, units)
    d_last = d_first.new_empty(parts, units, outputs)
    _launch("weights_backward", (parts, blocks), x, gradient, first, bias, last, d_first, d_bias, d_last,
            x.shape[:-1].numel(), D=x.shape[-1], W=block, O=outputs)  # fmt: skip
    return d_first.sum(0), d_bias.sum(0), d_last.sum(0).T


def weights_of(layer, heads, last: Tensor) -> tuple[Tensor, ...]:
    """What `Network.of` takes, of a TokenAttention, ResidualHeads and the weight of their joined last layers."""
    norms = torch.stack([layer.norm_attention.weight, layer.norm_attention.bias, layer.norm_hidden.weight, layer.norm_hidden.bias])
    inner, outer = layer.hidden[0], layer.hidden[2]
    return norms, inner.weight, inner.bias, outer.weight, outer.bias, heads.first.weight, heads.first.bias, last


def project(layer, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, biases and values of (B, T, d) tokens; weights of a head sum to 1, so the values can carry the output bias."""
    keys, biases, values = layer.project(tokens)
    return keys, biases, values + layer.out.bias / layer.heads


def deform(layer, heads, features: Tensor, tokens: Tensor, base: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """base[name] (N, size) plus what its head says of (N, d) features and (B, T, d) tokens -> (B, N, size) each, and
    attention (B, N, T)."""
    last, bias = heads.joined()
    *outputs, attention = _Deform.apply(heads.sizes, torch.is_grad_enabled(), features, *project(layer, tokens),
                                        heads.join(base) + bias, *weights_of(layer, heads, last))  # fmt: skip
    return dict(zip(heads.sizes, outputs, strict=True)), attention
