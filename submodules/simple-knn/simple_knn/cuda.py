"""The CUDA kernel of csrc/knn.cu: sorts the points along a Morton curve, bounds runs of them with boxes, and calls it."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

RUN = 32  # kRun of knn.cu
_I, _P = ctypes.c_int64, ctypes.c_void_p


def load(path: Path) -> ctypes.CDLL | None:
    """The compiled kernel, or None where the package was built without nvcc."""
    if not path.is_file():
        return None
    library = ctypes.CDLL(str(path))
    library.knn_nearest.argtypes = [_I, _P, _I, _P, _I, _P, _P, ctypes.c_int, _P]
    return library


LIBRARY = load(Path(__file__).with_name("libknn_cuda.so"))


def morton_order(points: Tensor) -> Tensor:
    """(N,) indices that sort the points along a Z-curve of 1024 cells an axis."""
    low, high = points.amin(0), points.amax(0)
    cell = ((points - low) / (high - low).clamp_min(1e-30) * 1023).clamp(0, 1023).to(torch.int32)
    for shift, mask in ((16, 0x030000FF), (8, 0x0300F00F), (4, 0x030C30C3), (2, 0x09249249)):
        cell = (cell | cell << shift) & mask
    return (cell[:, 0] | cell[:, 1] << 1 | cell[:, 2] << 2).argsort()


def run_boxes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Corners of the boxes around runs of RUN boxes (points are boxes without extent)."""
    missing = -len(low) % RUN
    low, high = (torch.cat([t, t[-1:].expand(missing, 3)]).view(-1, RUN, 3) for t in (low, high))
    return low.amin(1), high.amax(1)


def mean_squared_distance(points: Tensor, library: ctypes.CDLL, stream: int) -> Tensor:
    """(N, 3) float32 or float64 -> (N,)."""
    order = morton_order(points)
    ordered = points[order].contiguous()
    boxes = run_boxes(ordered, ordered)
    groups = run_boxes(*boxes)
    box, group = torch.cat(boxes, 1), torch.cat(groups, 1)
    found = torch.empty_like(ordered[:, 0])
    status = library.knn_nearest(
        len(ordered), ordered.data_ptr(), len(box), box.data_ptr(), len(group), group.data_ptr(), found.data_ptr(),
        points.dtype == torch.float64, stream,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"distCUDA2: CUDA error {status}")
    return torch.empty_like(found).index_copy_(0, order, found)
