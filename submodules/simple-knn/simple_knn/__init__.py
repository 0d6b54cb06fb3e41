"""Exact nearest-neighbour spacing of a point cloud: by a k-d tree (SciPy's), or by a CUDA kernel for points on a GPU."""

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from . import cuda

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
    if not torch.isfinite(points).all():
        raise ValueError("points holds NaN or infinity")
    if points.is_cuda and cuda.LIBRARY is not None:
        with torch.cuda.device(points.device):
            stream = torch.cuda.current_stream().cuda_stream
            return cuda.mean_squared_distance(points.detach().to(dtype), cuda.LIBRARY, stream)
    cloud = points.detach().to("cpu", torch.float64).numpy()
    # The point itself is among its 4 nearest, at distance 0; of duplicates the tree may name another, at the same distance.
    distance, _ = cKDTree(cloud).query(cloud, k=NEIGHBOURS + 1, workers=torch.get_num_threads())
    mean = torch.from_numpy((distance[:, 1:] ** 2).mean(1))
    return mean.to(points.device, dtype)
