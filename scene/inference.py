"""The deformation for rendering: the same numbers as deformation.py (to float rounding), several times as fast on a CPU.

Whatever no frame changes is worked out once: surfel features, and the surfels' own attributes, to which
the last layer adds directly (its bias and the unit of motion folded in). The rest is the fused kernel on a GPU, else it runs in
pieces of surfels small enough that everything between two layers stays in the processor's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scene.condition import Conditions
from scene.deformation import Deformation, Surfels, fused_network

ROWS = 4096  # surfels x frames of a piece on a CPU: the widest layer of the fast recipe then fills 2.5 MiB


class FrozenDeformation:
    """A trained `Deformation` over fixed canonical surfels; a snapshot: later changes of either are not seen."""

    def __init__(self, deformation: Deformation, surfels: Surfels):
        self.deformation = deformation
        self.features = deformation.features(surfels)
        self.sh_shape = surfels.sh.shape[-2:]
        still = {"xyz": surfels.xyz, "scaling": surfels.scaling, "rotation": F.normalize(surfels.rotation, dim=-1),
                 "opacity": surfels.opacity, "sh": surfels.sh.flatten(1)}  # fmt: skip
        heads = deformation.heads
        last, bias = heads.joined()
        self.base = heads.join(still) + bias  # (N, deformed attributes)
        self.still = {name: value[None] for name, value in still.items() if name not in heads.last}
        self.fused = fused_network(deformation, self.base.device)
        if self.fused:
            self.features = self.features.contiguous()
            self.network = self.fused.Network.of(*self.fused.weights_of(deformation.attention[0], heads, last))
        else:
            self.last = last.T

    def __call__(self, conditions: Conditions) -> Surfels:
        """Surfels of B frames, (B, N, ...), or (1, N, ...) of what no frame changes, and the attention of each to the tokens."""
        tokens, layers, heads = self.deformation.conditions(conditions), self.deformation.attention, self.deformation.heads
        if self.fused:
            outputs, attention, _ = self.fused.run_forward(
                self.features, self.fused.project(layers[0], tokens), self.network, self.base, heads.sizes, keep=False
            )
        else:
            outputs, attention = self._in_pieces([layer.project(tokens) for layer in layers])
            outputs = heads.split(outputs)
        values = self.still | outputs
        values["sh"] = values["sh"].unflatten(-1, self.sh_shape)
        return Surfels(**values, attention=attention)

    def _in_pieces(self, tokens: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys, biases and values for each layer -> deformed attributes (B, N, all sizes), attention (B, N, T)."""
        batch, _, kinds, _ = tokens[0][0].shape
        tokens = [(key.flatten(1, 2), bias.flatten(1, 2), value.flatten(1, 2)) for key, bias, value in tokens]
        count = len(self.base)
        out = self.base.new_empty(batch, count, self.base.shape[1])
        attention = self.base.new_empty(batch, kinds, count)
        step = max(1, ROWS // batch) if out.device.type == "cpu" else count
        for start in range(0, count, step):
            piece = slice(start, start + step)
            self._piece(piece, tokens, out[:, piece], attention[:, :, piece])
        return out, attention.transpose(1, 2)

    def _piece(self, piece: slice, tokens: list[tuple[Tensor, Tensor, Tensor]], out: Tensor, attention: Tensor) -> None:
        """Fill `out` (B, n, attributes) and `attention` (B, T, n) of the surfels `piece`."""
        x = self.features[piece]
        batch, kinds, _ = attention.shape
        for depth, (layer, (key, bias, value)) in enumerate(zip(self.deformation.attention, tokens, strict=True)):
            # scores lie with the surfels innermost, (B, h T, n): the few tokens are summed over whole vectors of surfels
            scores = torch.baddbmm(bias[..., None], key, x.expand(batch, -1, -1).transpose(1, 2))
            weights = scores.unflatten(1, (layer.heads, kinds)).softmax(2)
            mean = weights.mean(1)
            attention.copy_(mean) if depth == 0 else attention.add_(mean)
            x = torch.baddbmm(x.expand(batch, -1, -1), weights.flatten(1, 2).transpose(1, 2), value)
            x = layer.norm_attention(x + layer.out.bias)
            x = layer.norm_hidden(layer.hidden(x).add_(x))
        if len(tokens) > 1:
            attention.div_(len(tokens))
        hidden = self.deformation.heads.first(x.relu_()).relu_()
        out.copy_(torch.baddbmm(self.base[piece].expand(batch, -1, -1), hidden, self.last.expand(batch, -1, -1)))

