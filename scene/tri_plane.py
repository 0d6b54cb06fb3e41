"""Multi-resolution tri-plane: a feature for every point of space from three learned planes (K-Planes, Fridovich-Keil 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.device import runs_triton

PLANE_AXES = ((0, 1), (0, 2), (1, 2))  # xy, xz, yz


class TriPlane(nn.Module):
    """Features of world points: product over the three planes, concatenated over the resolutions."""

    def __init__(self, channels: int, resolution: int, multires: tuple[int, ...]):
        super().__init__()
        self.planes = nn.ParameterList(
            nn.Parameter(torch.empty(3, channels, resolution * m, resolution * m).uniform_(0.1, 0.5)) for m in multires
        )
        self.register_buffer("box", torch.tensor([[-1.0] * 3, [1.0] * 3]))  # lower and upper corner, dm
        self.width = channels * len(multires)

    def set_box(self, points: Tensor, margin: float = 0.1) -> None:
        """Fit the box to (N, 3) points with a margin relative to its size; outside it the border feature is read."""
        low, high = points.amin(0), points.amax(0)
        self.box.copy_(torch.stack([low - margin * (high - low), high + margin * (high - low)]))

    def forward(self, points: Tensor) -> Tensor:
        """(N, 3) points, dm -> (N, width) features."""
        if runs_triton(points.device):
            from scene.fused_tri_plane import sample

            return sample(list(self.planes), self.box, points)
        return self.plain(points)

    def plain(self, points: Tensor) -> Tensor:
        """The same in plain torch."""
        unit = (points - self.box[0]) / (self.box[1] - self.box[0]) * 2 - 1
        grid = torch.stack([torch.stack([unit[:, a], unit[:, b]], 1) for a, b in PLANE_AXES])[:, None]  # (3, 1, N, 2)
        features = []
        for plane in self.planes:
            xy, xz, yz = F.grid_sample(plane, grid, align_corners=True, padding_mode="border")[:, :, 0]
            features.append(xy * xz * yz)  # the gradient of .prod() asks the host whether there are zeros
        return torch.cat(features).T
