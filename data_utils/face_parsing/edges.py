"""Soft masks that follow the picture: colour-guided filter (space) and motion-aware averaging (time). Masks are (C, h, w)."""

from __future__ import annotations

import cv2
import numpy as np


def guided_upsample(soft: np.ndarray, small: np.ndarray, full: np.ndarray, radius: int, epsilon: float) -> np.ndarray:
    """(C, H, W): `soft` (C, h, w) float32 moved onto the edges of the picture and to its full size.

    Guided filter with a colour guide (He, Sun, Tang 2013): in every window of `radius` the output is a linear function of the
    guide's colour; the coefficients are found at the small size and applied at the full one (fast guided filter, He & Sun 2015).
    small (h, w, 3), full (H, W, 3) float32 in [0, 1]; `epsilon` in squared colour units: what contrast counts as an edge.
    """
    window = (2 * radius + 1, 2 * radius + 1)
    height, width = full.shape[:2]

    def mean(x):
        return cv2.blur(x, window, borderType=cv2.BORDER_REFLECT)

    def enlarged(x):
        return cv2.resize(mean(x), (width, height), interpolation=cv2.INTER_LINEAR)

    guide, wide = cv2.split(small), cv2.split(full)
    mu = [mean(channel) for channel in guide]
    # covariance of the guide (symmetric 3x3, regularised) and its inverse by cofactors
    xx, yy, zz = (mean(g * g) - m * m + np.float32(epsilon) for g, m in zip(guide, mu, strict=True))
    xy, xz, yz = (mean(guide[i] * guide[j]) - mu[i] * mu[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    a, b, c = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
    d, e, f = xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy
    determinant = xx * a + xy * b + xz * c
    rows = [[part / determinant for part in row] for row in ((a, b, c), (b, d, e), (c, e, f))]
    out = np.empty((len(soft), height, width), np.float32)
    for k, mask in enumerate(soft):
        mu_mask = mean(mask)
        cross = [mean(mask * g) - mu_mask * m for g, m in zip(guide, mu, strict=True)]
        slopes = [row[0] * cross[0] + row[1] * cross[1] + row[2] * cross[2] for row in rows]
        out[k] = enlarged(mu_mask - slopes[0] * mu[0] - slopes[1] * mu[1] - slopes[2] * mu[2])
        for slope, channel in zip(slopes, wide, strict=True):
            out[k] += enlarged(slope) * channel
    return out


def average_over_time(pictures: list[np.ndarray], softs: list[np.ndarray], centre: int, noise: float = 0.03) -> np.ndarray:
    """Average of `softs` [(C, h, w)] around frame `centre`, where the picture stands still; where it moves, the frame's own value.

    Weight of a neighbour at a pixel: exp(-(colour difference / noise)^2), so there is no lag. pictures [(h, w, 3)] in [0, 1].
    """
    total = softs[centre].copy()
    weight = np.ones(total.shape[1:], np.float32)
    for k, picture in enumerate(pictures):
        if k == centre:
            continue
        difference = cv2.blur(cv2.transform((picture - pictures[centre]) ** 2, np.ones((1, 3), np.float32)), (5, 5))
        w = cv2.exp(difference * np.float32(-1.0 / noise**2))
        total += softs[k] * w
        weight += w
    return total / weight
