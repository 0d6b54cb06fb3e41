"""The call interface of the 2DGS rasterizer over `rasterize_surfels`, so that code written for it runs unchanged.

That module samples pixels at integer coordinates and maps x_ndc to (W x_ndc + W - 1)/2; ours samples at + 0.5 with
c_x = W/2 (1 + P02): the same pixels of the same image. Near plane 0.2, far 100; blending is limited to the tiles of the 3-sigma
square.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .surfels import check_arguments, draw

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
    zeros = torch.cat([projection[0, [1, 3]], projection[1, [0, 3]], projection[3, [0, 1, 3]], projection[3, 2:3] - 1])
    if not bool((zeros.abs() <= 1e-3 * projection.abs().max()).all()):
        raise ValueError("projmatrix must be viewmatrix @ P for a perspective P (transposed, row vectors), without skew")
    W, H = settings.image_width, settings.image_height
    K = torch.eye(3, dtype=torch.float64, device=view.device)
    K[0, 0], K[0, 2] = W / 2 * projection[0, 0], W / 2 * (1 + projection[0, 2])
    K[1, 1], K[1, 2] = H / 2 * projection[1, 1], H / 2 * (1 + projection[1, 2])
    return K


def rasterize_gaussians(
    means3D: Tensor, means2D: Tensor | None, sh: Tensor | None, colors_precomp: Tensor | None, opacities: Tensor,
    scales: Tensor | None, rotations: Tensor | None, cov3Ds_precomp: Tensor | None, raster_settings: GaussianRasterizationSettings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `GaussianRasterizer.forward`. Arguments not used are None or empty 1-D tensors."""
    s = raster_settings
    sh, colors_precomp, scales, rotations, cov3Ds_precomp = (
        t if t is not None and t.dim() >= 2 else None for t in (sh, colors_precomp, scales, rotations, cov3Ds_precomp)
    )
    if (sh is None) == (colors_precomp is None):
        raise ValueError("give exactly one of shs (P, M, 3) and colors_precomp (P, 3)")
    if cov3Ds_precomp is not None:
        raise ValueError("cov3D_precomp (precomputed homographies) is not supported: give scales and rotations")
    if scales is None or rotations is None:
        raise ValueError("scales (P, 2) and rotations (P, 4) must be given")
    call = check_arguments(
        means3D[None], rotations[None], scales[None] * s.scale_modifier, opacities.reshape(1, -1),
        (sh if colors_precomp is None else colors_precomp)[None], s.viewmatrix.detach().T[None], _intrinsics(s)[None],
        s.image_width, s.image_height, s.bg, s.sh_degree if colors_precomp is None else None,
        aux=("depth", "normal", "median_depth", "distortion"), near=NEAR, far=FAR, cutoff="2dgs",
    )  # fmt: skip
    out = draw(call, None if means2D is None else means2D[None, :, :2])
    allmap = torch.cat([out.depth, out.alpha, out.normal, out.median_depth, out.distortion], 1)
    return out.features[0], out.radii[0], allmap[0]


class GaussianRasterizer(nn.Module):
    """One render a call: `GaussianRasterizer(settings)(means3D, means2D, opacities, ...)`."""

    def __init__(self, raster_settings: GaussianRasterizationSettings):
        super().__init__()
        self.raster_settings = raster_settings

    @torch.no_grad()
    def markVisible(self, positions: Tensor) -> Tensor:  # noqa: N802
        """(P, 3) world -> (P,) bool: beyond the near plane."""
        view = self.raster_settings.viewmatrix
        return positions @ view[:3, 2] + view[3, 2] > NEAR

    def forward(
        self, means3D, means2D, opacities, shs=None, colors_precomp=None, scales=None, rotations=None, cov3D_precomp=None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """means3D (P, 3); means2D (P, 2 or 3), whose .grad receives the densification signal; opacities (P, 1); one of
        shs (P, M, 3) and colors_precomp (P, C); scales (P, 2); rotations (P, 4) wxyz.

        Returns colour (C, H, W), radii (P,) int32, allmap (7, H, W): depth, alpha, normal (3 planes, camera space), median depth,
        distortion.
        """
        return rasterize_gaussians(
            means3D, means2D, shs, colors_precomp, opacities, scales, rotations, cov3D_precomp, self.raster_settings
        )
