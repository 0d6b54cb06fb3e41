"""The tri-plane on a GPU: one Triton kernel reads all planes of a point, one adds its gradient to them.

torch's grid_sample adds every channel of a corner to memory far from the last one; here the channels of a cell are neighbours.
The reference, and the path of CPUs, is the plain torch of tri_plane.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

POINTS = 32  # of a program


@triton.jit
def _cell(at, low, high, SIZE: tl.constexpr):
    """World coordinates -> lower cell, upper cell, how far between them, cells a unit of the world (0 outside the box)."""
    scale = (SIZE - 1) / (high - low)
    place = (at - low) * scale
    moves = (place > 0) & (place < SIZE - 1)
    place = tl.minimum(tl.maximum(place, 0.0), SIZE - 1.0)
    lower = tl.minimum(place.to(tl.int32), SIZE - 1)
    return lower, tl.minimum(lower + 1, SIZE - 1), place - lower.to(tl.float32), tl.where(moves, scale, 0.0)


@triton.jit
def _corners(plane, points, box, row, inside, channel, P: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """Plane P (xy, xz, yz) at the points: pointers to the four cells (rows, channels), and fractions and scales of both axes."""
    FIRST: tl.constexpr = P // 2
    SECOND: tl.constexpr = 1 if P == 0 else 2
    x = tl.load(points + row * 3 + FIRST, mask=inside, other=0.0)
    y = tl.load(points + row * 3 + SECOND, mask=inside, other=0.0)
    x0, x1, fx, sx = _cell(x, tl.load(box + FIRST), tl.load(box + 3 + FIRST), SIZE)
    y0, y1, fy, sy = _cell(y, tl.load(box + SECOND), tl.load(box + 3 + SECOND), SIZE)
    plane += P * SIZE * SIZE * CHANNELS + channel[None, :]
    lower, upper = (y0 * SIZE)[:, None], (y1 * SIZE)[:, None]
    a, b = plane + (lower + x0[:, None]) * CHANNELS, plane + (lower + x1[:, None]) * CHANNELS
    c, d = plane + (upper + x0[:, None]) * CHANNELS, plane + (upper + x1[:, None]) * CHANNELS
    return a, b, c, d, fx[:, None], fy[:, None], sx, sy


@triton.jit
def _sample(plane, points, box, row, inside, channel, P: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    a, b, c, d, fx, fy, sx, sy = _corners(plane, points, box, row, inside, channel, P, SIZE, CHANNELS)
    own = inside[:, None] & (channel[None, :] < CHANNELS)
    lower = tl.load(a, mask=own, other=0.0) * (1 - fx) + tl.load(b, mask=own, other=0.0) * fx
    upper = tl.load(c, mask=own, other=0.0) * (1 - fx) + tl.load(d, mask=own, other=0.0) * fx
    return lower * (1 - fy) + upper * fy


@triton.jit
def _add(plane, gradient_plane, points, box, row, inside, channel, gradient, P: tl.constexpr, SIZE: tl.constexpr,
         CHANNELS: tl.constexpr):  # fmt: skip
    """Add the (rows, channels) gradient of a plane's sample to its cells; returns the gradient along both axes."""
    a, b, c, d, fx, fy, sx, sy = _corners(plane, points, box, row, inside, channel, P, SIZE, CHANNELS)
    own = inside[:, None] & (channel[None, :] < CHANNELS)
    va, vb = tl.load(a, mask=own, other=0.0), tl.load(b, mask=own, other=0.0)
    vc, vd = tl.load(c, mask=own, other=0.0), tl.load(d, mask=own, other=0.0)
    along_x = tl.sum(gradient * ((vb - va) * (1 - fy) + (vd - vc) * fy), 1) * sx
    along_y = tl.sum(gradient * ((vc - va) * (1 - fx) + (vd - vb) * fx), 1) * sy
    a, b, c, d, fx, fy, sx, sy = _corners(gradient_plane, points, box, row, inside, channel, P, SIZE, CHANNELS)
    tl.atomic_add(a, gradient * (1 - fx) * (1 - fy), mask=own, sem="relaxed")
    tl.atomic_add(b, gradient * fx * (1 - fy), mask=own, sem="relaxed")
    tl.atomic_add(c, gradient * (1 - fx) * fy, mask=own, sem="relaxed")
    tl.atomic_add(d, gradient * fx * fy, mask=own, sem="relaxed")
    return along_x, along_y


@triton.jit
def _sample_all(plane, points, box, row, inside, channel, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    return (_sample(plane, points, box, row, inside, channel, 0, SIZE, CHANNELS),
            _sample(plane, points, box, row, inside, channel, 1, SIZE, CHANNELS),
            _sample(plane, points, box, row, inside, channel, 2, SIZE, CHANNELS))  # fmt: skip


@triton.jit
def forward(planes, points, box, features, N, SIZES: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr,
            ROWS: tl.constexpr):  # fmt: skip
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    inside = row < N
    for i in tl.static_range(len(SIZES)):
        xy, xz, yz = _sample_all(planes[i], points, box, row, inside, channel, SIZES[i], CHANNELS)
        at = features + (row[:, None] * len(SIZES) + i) * CHANNELS + channel[None, :]
        tl.store(at, xy * xz * yz, mask=inside[:, None] & (channel[None, :] < CHANNELS))


@triton.jit
def backward(planes, points, box, gradient, d_planes, d_points, N, SIZES: tl.constexpr, CHANNELS: tl.constexpr,
             C: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    inside = row < N
    x, y, z = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(len(SIZES)):
        at = gradient + (row[:, None] * len(SIZES) + i) * CHANNELS + channel[None, :]
        g = tl.load(at, mask=inside[:, None] & (channel[None, :] < CHANNELS), other=0.0)
        xy, xz, yz = _sample_all(planes[i], points, box, row, inside, channel, SIZES[i], CHANNELS)
        a, b = _add(planes[i], d_planes[i], points, box, row, inside, channel, g * xz * yz, 0, SIZES[i], CHANNELS)
        x, y = x + a, y + b
        a, b = _add(planes[i], d_planes[i], points, box, row, inside, channel, g * xy * yz, 1, SIZES[i], CHANNELS)
        x, z = x + a, z + b
        a, b = _add(planes[i], d_planes[i], points, box, row, inside, channel, g * xy * xz, 2, SIZES[i], CHANNELS)
        y, z = y + a, z + b
    tl.store(d_points + row * 3, x, mask=inside)
    tl.store(d_points + row * 3 + 1, y, mask=inside)
    tl.store(d_points + row * 3 + 2, z, mask=inside)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, box, *planes):
        points, cells = points.contiguous(), tuple(plane.permute(0, 2, 3, 1).contiguous() for plane in planes)
        features = points.new_empty(len(points), sum(plane.shape[1] for plane in planes))
        _launch(forward, points, cells, points, box, features)
        ctx.save_for_backward(points, box, *cells)
        return features

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        points, box, *cells = ctx.saved_tensors
        d_points, d_cells = torch.empty_like(points), tuple(torch.zeros_like(cell) for cell in cells)
        _launch(backward, points, tuple(cells), points, box, gradient.contiguous(), d_cells, d_points)
        return d_points, None, *(cell.permute(0, 3, 1, 2) for cell in d_cells)


def _launch(kernel, points: Tensor, cells: tuple[Tensor, ...], *tensors) -> None:
    channels = cells[0].shape[-1]
    with torch.cuda.device_of(points):
        kernel[(triton.cdiv(len(points), POINTS),)](
            cells, *tensors, len(points), SIZES=tuple(cell.shape[1] for cell in cells), CHANNELS=channels,
            C=triton.next_power_of_2(channels), ROWS=POINTS,
        )  # fmt: skip


def sample(planes: list[Tensor], box: Tensor, points: Tensor) -> Tensor:
    """What TriPlane.forward returns: (3, C, S, S) planes of one or more S, (2, 3) box, (N, 3) points -> (N, all C)."""
    return _Sample.apply(points, box, *planes)
