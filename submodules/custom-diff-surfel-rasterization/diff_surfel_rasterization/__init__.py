"""Batched, differentiable rasterizer of 2D Gaussian surfels (`rasterize_surfels`), and the loss to fit them with (`ssim_l1`)."""

from . import cpu as _cpu_back_end  # noqa: F401  registers its kernels
from . import cuda as _cuda_back_end  # noqa: F401  likewise
from .compat import GaussianRasterizationSettings, GaussianRasterizer, rasterize_gaussians
from .cuda import graph_overflowed
from .image_loss import ssim_l1
from .surfels import SurfelImages, rasterize_surfels

__all__ = [
    "GaussianRasterizationSettings", "GaussianRasterizer", "SurfelImages", "graph_overflowed", "rasterize_gaussians",
    "rasterize_surfels", "ssim_l1",
]  # fmt: skip
