"""The deformation for rendering: the same numbers as deformation.py (to float rounding), several times as fast on a CPU.

Whatever no frame changes is worked out once: surfel features, attention queries, and the surfels' own attributes, to which
the last layer adds directly (its bias and the unit of motion folded in). The rest is the fused kernel on a GPU, else it runs in
pieces of surfels small enough that everything between two layers stays in the processor's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scene.condition import Conditions
from scene.deformation import SCALES, Deformation, Surfels, fused_network

ROWS = 4096  # surfels x frames of a piece on a CPU: the widest layer of the fast recipe then fills 2.5 MiB


class FrozenDeformation:
    """A trained `Deformation` over fixed canonical surfels; a snapshot: later changes of either are not seen."""

    def __init__(self, deformation: Deformation, surfels: Surfels):
        self.deformation = deformation
        self.features = deformation.features(surfels)
        count, self.sh_shape = len(surfels.xyz), surfels.sh.shape[-2:]
        rotation = F.normalize(surfels.rotation, dim=-1)
        self.still = {"xyz": surfels.xyz, "scaling": surfels.scaling, "rotation": rotation, "opacity": surfels.opacity,
                      "sh": surfels.sh.reshape(count, -1)}  # fmt: skip
        layers = deformation.heads.last
        scales = [SCALES.get(name, 1.0) for name in layers]
        self.sizes = [layer.out_features for layer in layers.values()]
        self.names = list(layers)
        self.last = torch.block_diag(*(scale * layer.weight for scale, layer in zip(scales, layers.values(), strict=True))).T
        bias = torch.cat([scale * layer.bias for scale, layer in zip(scales, layers.values(), strict=True)])
        self.base = torch.cat([self.still.pop(name) for name in self.names], 1) + bias  # (N, deformed attributes)
        first = deformation.attention[0]
        self.query = first.query(self.features)
        self.fused = fused_network(deformation, self.base.device)
        if self.fused:
            self.network = self.fused.Network.of(*self.fused.weights_of(first, deformation.heads, SCALES))
            self.features = (self.features + first.out.bias).contiguous()
            self.query = self.query.to(self.network.w1.dtype)

    def __call__(self, conditions: Conditions) -> Surfels:
        """Surfels of B frames, (B, N, ...), or (1, N, ...) of what no frame changes, and the attention of each to the tokens."""
        tokens = self.deformation.conditions(conditions)
        keys = [layer.keys_and_values(tokens) for layer in self.deformation.attention]
        if self.fused:
            outputs, attention, _ = self.fused.run_forward(
                self.features, self.query, *keys[0], self.network, self.base, tuple(self.sizes), keep=False
            )
        else:
            outputs, attention = self._in_pieces(keys)
        values = {name: value[None] for name, value in self.still.items()} | dict(zip(self.names, outputs, strict=True))
        values["sh"] = values["sh"].unflatten(-1, self.sh_shape)
        return Surfels(**values, attention=attention)

    def _in_pieces(self, keys: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Deformed attributes (B, N, size) each, attention (B, N, T)."""
        batch, _, kinds, _ = keys[0][0].shape
        keys = [(key.flatten(1, 2), value.flatten(1, 2)) for key, value in keys]
        count = len(self.base)
        out = self.base.new_empty(batch, count, self.base.shape[1])
        attention = self.base.new_empty(batch, kinds, count)
        step = max(1, ROWS // batch) if out.device.type == "cpu" else count
        for start in range(0, count, step):
            piece = slice(start, start + step)
            self._piece(piece, keys, out[:, piece], attention[:, :, piece])
        return out.split(self.sizes, -1), attention.transpose(1, 2)

    def _piece(self, piece: slice, keys: list[tuple[Tensor, Tensor]], out: Tensor, attention: Tensor) -> None:
        """Fill `out` (B, n, attributes) and `attention` (B, T, n) of the surfels `piece`."""
        x = self.features[piece]
        batch, kinds, _ = attention.shape
        for depth, (layer, (key, value)) in enumerate(zip(self.deformation.attention, keys, strict=True)):
            # scores lie with the surfels innermost, (B, h, T, n): the few tokens are summed over whole vectors of surfels
            if depth == 0:
                scores = key @ self.query[piece].T
            else:
                scores = key @ layer.query(x).transpose(1, 2)
            weights = scores.unflatten(1, (layer.heads, kinds)).softmax(2)
            mean = weights.mean(1)
            attention.copy_(mean) if depth == 0 else attention.add_(mean)
            x = torch.baddbmm(x.expand(batch, -1, -1), weights.flatten(1, 2).transpose(1, 2), value)
            x = layer.norm_attention(x + layer.out.bias)
            x = layer.norm_hidden(layer.hidden(x).add_(x))
        if len(keys) > 1:
            attention.div_(len(keys))
        hidden = self.deformation.heads.first(x.relu_()).relu_()
        out.copy_(torch.baddbmm(self.base[piece].expand(batch, -1, -1), hidden, self.last.expand(batch, -1, -1)))

