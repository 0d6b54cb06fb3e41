"""A z-buffer rasterizer in plain numpy: every pixel under every triangle at once. Fast for the small triangles of dense grids."""

from __future__ import annotations

import numpy as np


def rasterize(points: np.ndarray, depth: np.ndarray, triangles: np.ndarray, height: int, width: int):
    """Which triangle each pixel sees.

    points (V, 2) float32 px (x right, y down, pixel centres at +0.5), depth (V,) > 0, triangles (T, 3) counter-clockwise as
    seen by the camera (others are culled). Returns (pixels (P,) flat indices covered, triangle (P,) row of `triangles`,
    weights (P, 3) float32). The weights are affine in the picture; for triangles this small that is perspective to 1e-3.
    """
    x, y = np.ascontiguousarray(points.T, dtype=np.float32)
    (x0, x1, x2), (y0, y1, y2) = x[triangles.T], y[triangles.T]
    area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)  # negative: counter-clockwise with y down
    left, wide = _span(x0, x1, x2, width)
    top, tall = _span(y0, y1, y2, height)
    rows = np.flatnonzero((area < -1e-6) & (wide > 0) & (tall > 0))
    x0, y0, x1, y1, x2, y2, area, left, wide, top, tall = (c[rows] for c in (x0, y0, x1, y1, x2, y2, area, left, wide, top, tall))
    inverse = (1.0 / depth.astype(np.float32))[triangles[rows].T]  # (3, T'): 1 / z is affine in the picture

    # barycentric weights as affine functions of the pixel's offset from the triangle's first pixel
    px, py = (left + 0.5).astype(np.float32) - x0, (top + 0.5).astype(np.float32) - y0
    b1x, b1y = (y2 - y0) / area, (x0 - x2) / area
    b2x, b2y = (y0 - y1) / area, (x1 - x0) / area
    b1, b2 = b1x * px + b1y * py, b2x * px + b2y * py
    d1, d2 = inverse[1] - inverse[0], inverse[2] - inverse[0]

    count = wide * tall
    index = np.repeat(np.arange(len(rows), dtype=np.int32), count)
    offset = np.arange(len(index), dtype=np.int32) - np.repeat((np.cumsum(count) - count).astype(np.int32), count)
    across = wide[index]
    dy = offset // across
    dx = offset - dy * across
    fx, fy = dx.astype(np.float32), dy.astype(np.float32)
    w1 = b1[index] + b1x[index] * fx + b1y[index] * fy
    w2 = b2[index] + b2x[index] * fx + b2y[index] * fy
    inside = np.flatnonzero((w1 >= -1e-5) & (w2 >= -1e-5) & (w1 + w2 <= 1 + 1e-5))
    index, w1, w2, dx, dy = index[inside], w1[inside], w2[inside], dx[inside], dy[inside]
    pixel = (top[index] + dy) * width + left[index] + dx

    nearness = inverse[0][index] + w1 * d1[index] + w2 * d2[index]
    buffer = np.zeros(height * width, np.float32)
    np.maximum.at(buffer, pixel, nearness)
    front = np.flatnonzero(nearness == buffer[pixel])
    winner = np.full(height * width, -1, np.int32)
    winner[pixel[front]] = front  # ties (a shared edge): the last one
    covered = np.flatnonzero(winner >= 0)
    chosen = winner[covered]
    w1, w2 = w1[chosen], w2[chosen]
    return covered, rows[index[chosen]], np.stack([1 - w1 - w2, w1, w2], 1)


def _span(a: np.ndarray, b: np.ndarray, c: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel whose centre lies within the three coordinates, and how many there are (0 or less: none)."""
    first = np.ceil(np.minimum(np.minimum(a, b), c) - 0.5).astype(np.int32)
    last = np.floor(np.maximum(np.maximum(a, b), c) - 0.5).astype(np.int32)
    first = np.maximum(first, 0)
    return first, np.minimum(last, limit - 1) - first + 1
