"""From driving signals to surfels: surfel features, attention over the tokens, heads of residuals (lineage.md 3.2-3.5)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from scene.attention import TokenAttention
from scene.condition import ConditionEncoder, Conditions
from scene.tri_plane import TriPlane
from utils.device import runs_triton

MOTION = 0.1  # dm a unit of the position head: lips move by tenths of a decimetre, logits and log scales by units


def feature_width(config) -> int:
    """Width of a surfel's features, its embedding and the whole network."""
    return config.plane_channels * len(config.plane_multires)


@dataclasses.dataclass
class Surfels:
    """Surfel attributes before activation: (N, ...) canonical, (B, N, ...) deformed. Scale is log, opacity a logit.

    Of deformed surfels an attribute that no frame changes is (1, N, ...).
    """

    xyz: Tensor  # (..., N, 3) dm
    scaling: Tensor  # (..., N, 2)
    rotation: Tensor  # (..., N, 4) quaternion w x y z, any length
    opacity: Tensor  # (..., N, 1)
    sh: Tensor  # (..., N, K, 3)
    embedding: Tensor | None = None  # (N, width) learned with the surfel, canonical only
    attention: Tensor | None = None  # (B, N, T) weight of each token, sums to 1


class ResidualHeads(nn.Module):
    """ReLU-Linear-ReLU-Linear for each named output, run as two products over all of them.

    The last layers start at zero, so that the fine stage begins with exactly the head the coarse stage ended with (the
    published recipe starts them at random with a small gain, which throws surfels pixels away from where they were).
    """

    def __init__(self, width: int, hidden: int, outputs: dict[str, int], scales: dict[str, float] | None = None):
        """`outputs`: sizes; `scales`: what a unit of an output is worth, 1 where not given."""
        super().__init__()
        self.first = nn.Linear(width, hidden * len(outputs))
        self.last = nn.ModuleDict({name: nn.Linear(hidden, size) for name, size in outputs.items()})
        self.sizes, self.scales = outputs, scales or {}
        for layer in self.last.values():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def joined(self) -> tuple[Tensor, Tensor]:
        """The last layers, scaled, as one: block-diagonal weight (all outputs, all hidden units) and bias."""
        layers = [(layer.weight, layer.bias) for layer in self.last.values()]
        for k, name in enumerate(self.last):
            if name in self.scales:
                layers[k] = tuple(self.scales[name] * value for value in layers[k])
        weights, biases = zip(*layers, strict=True)
        return torch.block_diag(*weights), torch.cat(biases)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(..., width) -> name -> (..., size)."""
        rows = x.reshape(-1, x.shape[-1])  # in-place ReLU on a view of more dimensions would copy the hidden tensor thrice
        # the last layers are small, so one block-diagonal product beats slicing the wide hidden tensor
        out = nn.functional.linear(self.first(rows.relu()).relu_(), *self.joined()).view(*x.shape[:-1], -1)
        return self.split(out)

    def join(self, values: dict[str, Tensor]) -> Tensor:
        """name -> (..., size), in the order of the outputs: (..., all); others are left out."""
        return torch.cat([values[name] for name in self.last], -1)

    def split(self, out: Tensor) -> dict[str, Tensor]:
        """Undo `join`."""
        return dict(zip(self.last, out.split(list(self.sizes.values()), -1), strict=True))


class Deformation(nn.Module):
    """Residuals of the surfel attributes that deform, from the conditions of a frame; the others stay canonical."""

    def __init__(self, config, audio_features: int):
        """`config` carries ModelHiddenParams and sh_degree (arguments/__init__.py)."""
        super().__init__()
        colour = 3 * (config.sh_degree + 1) ** 2
        width = feature_width(config)
        self.tri_plane = None
        if config.surfel_features != "embedding":
            self.tri_plane = TriPlane(config.plane_channels, config.plane_resolution, tuple(config.plane_multires))
        frames = config.frames if config.frame_code == "embedding" else 0  # Scene counts them
        self.conditions = ConditionEncoder(
            tuple(config.tokens), audio_features, width, config.condition_noise, config.audio_window, frames, config.code_dropout
        )
        self.attention = nn.ModuleList(
            TokenAttention(width, config.heads, config.ffn_hidden, config.dropout) for _ in range(config.layers)
        )
        sizes = {"xyz": 3, "scaling": 2, "rotation": 4, "opacity": 1, "sh": colour}
        sizes = {name: size for name, size in sizes.items() if name in config.deform}
        self.heads = ResidualHeads(width, config.net_width, sizes, {"xyz": MOTION})
        # the static stage trains the planes through this decoder; its result is then written into the surfels
        self.decoder = ResidualHeads(width, config.net_width, {"opacity": 1, "sh": colour})

    @property
    def token_names(self) -> tuple[str, ...]:
        return tuple(self.conditions.tokens)

    def features(self, surfels: Surfels) -> Tensor:
        """(N, width) what the network knows of each surfel: the tri-plane where it is, its own embedding, or their sum."""
        if self.tri_plane is None:
            return surfels.embedding
        planes = self.tri_plane(surfels.xyz)
        return planes if surfels.embedding is None else planes + surfels.embedding

    def canonical(self, surfels: Surfels) -> Surfels:
        """Coarse stage: opacity and colour as stored plus what the decoder reads from its features."""
        residual = self.decoder(self.features(dataclasses.replace(surfels, xyz=surfels.xyz.detach())))
        return dataclasses.replace(
            surfels,
            opacity=surfels.opacity + residual["opacity"],
            sh=surfels.sh + residual["sh"].view_as(surfels.sh),
        )

    def forward(self, surfels: Surfels, conditions: Conditions) -> Surfels:
        """Deform canonical surfels for B frames (rendering runs the same network faster: inference.py)."""
        x = self.features(surfels)
        tokens = self.conditions(conditions)
        base = {"xyz": surfels.xyz, "scaling": surfels.scaling, "rotation": nn.functional.normalize(surfels.rotation, dim=-1),
                "opacity": surfels.opacity, "sh": surfels.sh.flatten(1)}  # fmt: skip
        fused = fused_network(self, x.device)
        if fused:
            deformed, attention = fused.deform(self.attention[0], self.heads, x, tokens, base)
        else:
            maps = []
            for layer in self.attention:
                x, attention = layer(x, tokens)
                maps.append(attention)
            deformed = {name: base[name] + value for name, value in self.heads(x).items()}
            attention = torch.stack(maps).mean(0)
        values = {name: value[None] for name, value in base.items()} | deformed
        values["sh"] = values["sh"].unflatten(-1, surfels.sh.shape[-2:])
        return Surfels(**values, attention=attention)


def fused_network(deformation: Deformation, device: torch.device):
    """fused_deformation.py, where Triton runs on the device and can hold this network: one layer without active dropout that fits
    on chip; else None, and plain torch runs it."""
    if not runs_triton(device):
        return None
    from scene import fused_deformation

    return fused_deformation if fused_deformation.holds(deformation, device) else None
