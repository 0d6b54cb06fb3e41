"""Batched, differentiable rasterizer of 2D Gaussian surfels (`rasterize_surfels`), and what fits them to pictures: the loss
(`ssim_l1`) and the optimizer (`Adam`)."""

from . import cpu as _cpu_back_end  # noqa: F401  registers its kernels
from . import cuda as _cuda_back_end  # noqa: F401  likewise
from .compat import GaussianRasterizationSettings, GaussianRasterizer, rasterize_gaussians
from .cuda import graph_overflowed
from .image_loss import ssim_l1
from .optimizer import Adam
from .surfels import SurfelImages, rasterize_surfels

__all__ = [
    "Adam", "GaussianRasterizationSettings", "GaussianRasterizer", "SurfelImages", "graph_overflowed", "rasterize_gaussians",
    "rasterize_surfels", "ssim_l1",
]  # fmt: skip
