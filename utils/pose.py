"""Rotations, the tracker's camera, and its conversion to the cameras the renderer uses (docs/conventions.md).

The head is the world: x to the viewer's right, y up, z out of the face, decimetres. The tracker camera looks down -z:
X_cam = R X + t, u = cx - f x / z, v = cy + f y / z (z < 0), R = Rx(theta) Ry(phi) Rz(-psi).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLIP = (1.0, -1.0, -1.0)  # diagonal that takes OpenGL camera axes to OpenCV's and back


def euler_to_matrix(euler: Tensor) -> Tensor:
    """(..., 3) angles (theta, phi, psi) in radians -> (..., 3, 3), R = Rx(theta) Ry(phi) Rz(-psi)."""
    theta, phi, psi = euler.unbind(-1)
    st, ct, sp, cp, ss, cs = theta.sin(), theta.cos(), phi.sin(), phi.cos(), psi.sin(), psi.cos()
    rows = (
        (cp * cs, cp * ss, sp),
        (st * sp * cs - ct * ss, st * sp * ss + ct * cs, -st * cp),
        (-ct * sp * cs - st * ss, -ct * sp * ss + st * cs, ct * cp),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_euler(matrix: Tensor) -> Tensor:
    """Inverse of `euler_to_matrix` for |phi| < pi / 2: (..., 3, 3) -> (..., 3)."""
    theta = torch.atan2(-matrix[..., 1, 2], matrix[..., 2, 2])
    phi = torch.asin(matrix[..., 0, 2].clamp(-1.0, 1.0))
    psi = torch.atan2(matrix[..., 0, 1], matrix[..., 0, 0])
    return torch.stack([theta, phi, psi], -1)


def project(points: Tensor, rotation: Tensor, translation: Tensor, focal: Tensor | float, cx: float, cy: float) -> Tensor:
    """Pixels of world points through the tracker camera.

    points (N, 3) or (B, N, 3), rotation (B, 3, 3), translation (B, 3), focal px -> (B, N, 2). Pixel centres lie at +0.5.
    """
    x, y, z = (points @ rotation.transpose(-1, -2) + translation[:, None]).unbind(-1)
    return torch.stack([cx - focal * x / z, cy + focal * y / z], -1)


def camera_to_world(rotation: Tensor, translation: Tensor) -> Tensor:
    """Tracker pose (..., 3, 3), (..., 3) -> the 4x4 camera-to-world matrix that transforms_*.json stores."""
    matrix = torch.zeros(*rotation.shape[:-2], 4, 4, dtype=rotation.dtype, device=rotation.device)
    matrix[..., :3, :3] = rotation.transpose(-1, -2)
    matrix[..., :3, 3] = -(rotation.transpose(-1, -2) @ translation[..., None])[..., 0]
    matrix[..., 3, 3] = 1.0
    return matrix


def world_to_view(c2w: Tensor) -> Tensor:
    """Camera-to-world (..., 4, 4) with OpenGL camera axes -> world-to-camera (..., 4, 4) with OpenCV axes, column vectors."""
    flip = torch.tensor(FLIP, dtype=c2w.dtype, device=c2w.device)
    rotation = flip[:, None] * c2w[..., :3, :3].transpose(-1, -2)
    view = torch.zeros_like(c2w)
    view[..., :3, :3] = rotation
    view[..., :3, 3] = -(rotation @ c2w[..., :3, 3:])[..., 0]
    view[..., 3, 3] = 1.0
    return view


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """(..., 4) quaternions (w, x, y, z), normalised inside -> (..., 3, 3)."""
    w, x, y, z = torch.nn.functional.normalize(quaternion, dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def quaternion_of_normal(normal: Tensor) -> Tensor:
    """(..., 3) unit normals -> (..., 4) quaternions (w, x, y, z) that turn the z axis onto them by the shortest way."""
    x, y, z = torch.nn.functional.normalize(normal, dim=-1).unbind(-1)
    quaternion = torch.stack([1 + z, -y, x, torch.zeros_like(z)], -1)
    backwards = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=normal.dtype, device=normal.device)  # z = -1: any axis in xy
    quaternion = torch.where((z < -1 + 1e-6)[..., None], backwards, quaternion)
    return torch.nn.functional.normalize(quaternion, dim=-1)
