"""Soft masks that follow the picture: colour-guided filter (space) and motion-aware averaging (time)."""

from __future__ import annotations

import cv2
import numpy as np


def guided_upsample(soft: np.ndarray, small: np.ndarray, full: np.ndarray, radius: int, epsilon: float) -> np.ndarray:
    """(H, W, C): `soft` (h, w, C) float32 moved onto the edges of the picture and to its full size.

    Guided filter with a colour guide (He, Sun, Tang 2013): in every window of `radius` the output is a linear function of the
    guide's colour; the coefficients are found at the small size and applied at the full one (fast guided filter, He & Sun 2015).
    small (h, w, 3), full (H, W, 3) float32 in [0, 1]; `epsilon` in squared colour units: what contrast counts as an edge.
    """
    size = (2 * radius + 1, 2 * radius + 1)

    def mean(x):
        return cv2.blur(x, size, borderType=cv2.BORDER_REFLECT)

    mu, mu_soft = mean(small), mean(soft)
    red, green, blue = cv2.split(small)
    # covariance of the guide (symmetric 3x3, regularised) and its inverse by cofactors
    m = [mu[..., c] for c in range(3)]
    xx = mean(red * red) - m[0] * m[0] + epsilon
    yy = mean(green * green) - m[1] * m[1] + epsilon
    zz = mean(blue * blue) - m[2] * m[2] + epsilon
    xy, xz, yz = mean(red * green) - m[0] * m[1], mean(red * blue) - m[0] * m[2], mean(green * blue) - m[1] * m[2]
    c_xx, c_xy, c_xz = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
    c_yy, c_yz, c_zz = xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy
    inverse_det = 1.0 / (xx * c_xx + xy * c_xy + xz * c_xz)
    cross = [mean(soft * channel[..., None]) - mu_soft * m[c][..., None] for c, channel in enumerate((red, green, blue))]
    slopes = []
    for row in ((c_xx, c_xy, c_xz), (c_xy, c_yy, c_yz), (c_xz, c_yz, c_zz)):
        slopes.append(sum(cross[k] * (row[k] * inverse_det)[..., None] for k in range(3)))
    offset = mu_soft - sum(slopes[c] * m[c][..., None] for c in range(3))
    height, width = full.shape[:2]
    out = cv2.resize(mean(offset), (width, height), interpolation=cv2.INTER_LINEAR)
    for c in range(3):
        out += cv2.resize(mean(slopes[c]), (width, height), interpolation=cv2.INTER_LINEAR) * full[..., c : c + 1]
    return out


def average_over_time(pictures: list[np.ndarray], softs: list[np.ndarray], centre: int, noise: float = 0.03) -> np.ndarray:
    """Average of `softs` [(h, w, C)] around frame `centre`, where the picture stands still; where it moves, the frame's own value.

    Weight of a neighbour at a pixel: exp(-(colour difference / noise)^2), so there is no lag. pictures [(h, w, 3)] in [0, 1].
    """
    total = softs[centre].copy()
    weight = np.ones(total.shape[:2] + (1,), np.float32)
    for k, picture in enumerate(pictures):
        if k == centre:
            continue
        difference = cv2.blur(((picture - pictures[centre]) ** 2).sum(2), (5, 5))
        w = np.exp(difference * (-1.0 / noise**2))[..., None]
        total += softs[k] * w
        weight += w
    return total / weight
