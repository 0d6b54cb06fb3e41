"""Exact nearest-neighbour spacing of a point cloud, by a k-d tree (SciPy's)."""

import torch
from scipy.spatial import cKDTree
from torch import Tensor

__all__ = ["distCUDA2"]
NEIGHBOURS = 3


def distCUDA2(points: Tensor) -> Tensor:  # noqa: N802  the name Gaussian-splatting code imports, from the time it was CUDA only
    """Mean squared distance of each point to its 3 nearest others: (N, 3) -> (N,), same device, float32 (float64 for float64).

    Duplicates count as neighbours at distance 0. ValueError for another shape, fewer than 4 points, or NaN/infinity.
    """
    if not isinstance(points, Tensor) or points.dim() != 2 or points.shape[1] != 3 or not points.is_floating_point():
        what = f"{points.dtype} {tuple(points.shape)}" if isinstance(points, Tensor) else type(points).__name__
        raise ValueError(f"points must be a floating-point tensor of shape (N, 3), got {what}")
    if len(points) <= NEIGHBOURS:
        raise ValueError(
            f"points must hold at least {NEIGHBOURS + 1} points, so that each has {NEIGHBOURS} neighbours; got {len(points)}"
        )
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    cloud = points.detach().to("cpu", torch.float64).numpy()
    if not torch.isfinite(points).all():
        raise ValueError("points holds NaN or infinity")
    # The point itself is among its 4 nearest, at distance 0; of duplicates the tree may name another, at the same distance.
    distance, _ = cKDTree(cloud).query(cloud, k=NEIGHBOURS + 1, workers=torch.get_num_threads())
    mean = torch.from_numpy((distance[:, 1:] ** 2).mean(1))
    return mean.to(points.device, dtype)
