"""Cameras as the viewers of the 3DGS family read them."""

from __future__ import annotations

import torch
from torch import Tensor


def intrinsics(focal: float, cx: float, cy: float) -> Tensor:
    """(3, 3) pinhole matrix; pixel centres lie at +0.5."""
    return torch.tensor([[focal, 0.0, cx], [0.0, focal, cy], [0.0, 0.0, 1.0]])


def enlarged(matrix: Tensor, factor: float) -> Tensor:
    """Pinhole matrices (..., 3, 3) of the same view with `factor` times as many pixels a side."""
    return matrix * matrix.new_tensor([factor, factor, 1.0])[:, None]


def camera_json(index: int, name: str, view: Tensor, focal: float, width: int, height: int) -> dict:
    """One entry of cameras.json (SIBR): position and rotation are camera to world, OpenCV axes, dm; fx, fy in pixels."""
    rotation = view[:3, :3].T
    position = -(rotation @ view[:3, 3])
    return {
        "id": index, "img_name": name, "width": width, "height": height,
        "position": position.tolist(), "rotation": rotation.tolist(), "fy": focal, "fx": focal,
    }  # fmt: skip
