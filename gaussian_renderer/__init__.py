"""One call draws a batch of frames: colour, alpha, attention and depth maps in a single pass of the surfel rasterizer."""

from __future__ import annotations

import dataclasses

import torch
from diff_surfel_rasterization import rasterize_surfels
from torch import Tensor

from scene.condition import Conditions
from scene.deformation import Surfels
from utils.constants import FAR, NEAR


@dataclasses.dataclass
class Rendering:
    """B pictures over black: colour is premultiplied, so `rgb + (1 - alpha) * backdrop` composites it."""

    rgb: Tensor  # (B, 3, H, W)
    alpha: Tensor  # (B, 1, H, W)
    attention: Tensor | None  # (B, T, H, W), sums to alpha over T
    maps: object  # the rasterizer's output: depth, normal, distortion where asked for, radii, screen_grad
    surfels: Surfels  # what was drawn, before activation


def render_surfels(surfels: Surfels, conditions: Conditions, width: int, height: int, attention: bool = False,
                   aux: tuple[str, ...] = ()) -> Rendering:  # fmt: skip
    """Draw surfels, canonical (N, ...) or deformed (B, N, ...), through the cameras of `conditions`.

    With `attention` the (B, N, T) token weights are blended as T extra channels of the same pass.
    """
    batched = [x if x.dim() == 3 else x[None] for x in (surfels.xyz, surfels.rotation, surfels.scaling, surfels.opacity)]
    xyz, rotation, scaling, opacity = batched
    sh = surfels.sh if surfels.sh.dim() == 4 else surfels.sh[None]
    degree = round(sh.shape[-2] ** 0.5) - 1
    out = rasterize_surfels(
        xyz, rotation, scaling.exp(), opacity[..., 0].sigmoid(), (sh, surfels.attention) if attention else sh,
        conditions.view, conditions.intrinsics, width, height, sh_degree=degree, aux=aux, near=NEAR, far=FAR,
    )  # fmt: skip
    return Rendering(out.features[:, :3], out.alpha, out.features[:, 3:] if attention else None, out, surfels)


def render_batch(head, conditions: Conditions, width: int, height: int, attention: bool = False,
                 aux: tuple[str, ...] = ()) -> Rendering:  # fmt: skip
    """Deform `head` (scene.TalkingHead) for B frames and draw them at width x height."""
    return render_surfels(head(conditions), conditions, width, height, attention, aux)


def depth_to_normal(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """(B, 1, H, W) view depth -> (B, 3, H, W) unit normals in camera space, facing the camera (2DGS section 5.1).

    Central differences of the back-projected points; zero on the border.
    """
    height, width = depth.shape[-2:]
    y, x = (torch.arange(side, device=depth.device) + 0.5 for side in (height, width))
    fx, fy, cx, cy = (intrinsics[:, i, j].view(-1, 1, 1, 1) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    points = torch.cat([(x - cx) / fx * depth, (y[:, None] - cy) / fy * depth, depth], 1)
    dx = points[:, :, 1:-1, 2:] - points[:, :, 1:-1, :-2]
    dy = points[:, :, 2:, 1:-1] - points[:, :, :-2, 1:-1]
    normal = torch.nn.functional.normalize(torch.linalg.cross(dy, dx, dim=1), dim=1)
    return torch.nn.functional.pad(normal, (1, 1, 1, 1))
