"""The call interface of the 2DGS rasterizer over `rasterize_surfels`, so that code written for it runs unchanged.

That module samples pixels at integer coordinates and maps x_ndc to (W x_ndc + W - 1)/2; ours samples at + 0.5 with
c_x = W/2 (1 + P02): the same pixels of the same image. Near plane 0.2, far 100, blending limited to the tiles of the 3-sigma square.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .surfels import rasterize_surfels

NEAR, FAR = 0.2, 100.0


class GaussianRasterizationSettings(NamedTuple):
    """Camera and options of one render. Matrices are (4, 4) and transposed (row-vector convention): viewmatrix world to camera,
    projmatrix = viewmatrix @ projection. tanfovx, tanfovy, campos, prefiltered and debug are accepted and not needed."""

    image_height: int
    image_width: int
    tanfovx: float
    tanfovy: float
    bg: Tensor
    scale_modifier: float
    viewmatrix: Tensor
    projmatrix: Tensor
    sh_degree: int
    campos: Tensor
    prefiltered: bool
    debug: bool


def _intrinsics(settings: GaussianRasterizationSettings) -> Tensor:
    """(3, 3) K in pixels (centres at + 0.5) of the projection inside projmatrix."""
    view = settings.viewmatrix.detach().double()
    projection = torch.linalg.solve(view, settings.projmatrix.detach().double()).T  # clip = projection @ camera
    zeros = torch.stack([*projection[0, [1, 3]], *projection[1, [0, 3]], *projection[3, [0, 1, 3]], projection[3, 2] - 1])
    if not bool((zeros.abs() <= 1e-3 * projection.abs().max()).all()):
        raise ValueError("projmatrix must be viewmatrix @ P for a perspective P (transposed, row vectors), without skew")
    W, H = settings.image_width, settings.image_height
    K = torch.eye(3, dtype=torch.float64, device=view.device)
    K[0, 0], K[0, 2] = W / 2 * projection[0, 0], W / 2 * (1 + projection[0, 2])
    K[1, 1], K[1, 2] = H / 2 * projection[1, 1], H / 2 * (1 + projection[1, 2])
    return K


class _ScreenGradient(torch.autograd.Function):
    """Passes an image through; in backward hands `means2D` the screen gradient that the rasterizer has just computed."""

    @staticmethod
    def forward(ctx, screen, means2D):
        ctx.columns = means2D.shape[1]
        return screen + 0 * means2D[None, :, :2]

    @staticmethod
    def backward(ctx, grad):
        padded = grad.new_zeros(grad.shape[1], ctx.columns)
        padded[:, :2] = grad[0]
        return grad, padded


def rasterize_gaussians(
    means3D: Tensor, means2D: Tensor | None, sh: Tensor | None, colors_precomp: Tensor | None, opacities: Tensor,
    scales: Tensor, rotations: Tensor, cov3Ds_precomp: Tensor | None, raster_settings: GaussianRasterizationSettings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `GaussianRasterizer.forward`."""
    s = raster_settings
    given = lambda t: t is not None and t.numel() > 0  # noqa: E731
    if given(sh) == given(colors_precomp):
        raise ValueError("give exactly one of shs and colors_precomp")
    if given(cov3Ds_precomp):
        raise ValueError("cov3D_precomp (precomputed homographies) is not supported: give scales and rotations")
    if not given(scales) or not given(rotations):
        if len(means3D):
            raise ValueError("scales (P, 2) and rotations (P, 4) must be given")
        scales, rotations = means3D.new_zeros(0, 2), means3D.new_zeros(0, 4)
    out = rasterize_surfels(
        means3D[None], rotations[None], scales[None] * s.scale_modifier, opacities.reshape(1, -1),
        sh[None] if given(sh) else colors_precomp[None], s.viewmatrix.detach().T[None], _intrinsics(s)[None],
        s.image_width, s.image_height, background=s.bg, sh_degree=s.sh_degree if given(sh) else None,
        aux=("depth", "normal", "median_depth", "distortion"), near=NEAR, far=FAR, cutoff="2dgs", means2d=means2D,
    )  # fmt: skip
    allmap = torch.cat([out.depth, out.alpha, out.normal, out.median_depth, out.distortion], 1)
    return out.features[0], out.radii[0], allmap[0]
