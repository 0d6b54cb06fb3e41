"""The neutral head as a formula: a radius over azimuth and height, plus the relief of the features (anthropometric means).

Head frame (utils/pose.py): x to the viewer's right, y up, z out of the face, decimetres; the eyes lie at y = 0.22. A point
of the skin is named by its chart coordinates: azimuth (radians around the vertical axis AXIS_Z, 0 = front, + = right), y.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator

AXIS_Z = -0.10  # the vertical axis runs through (0, y, AXIS_Z)
TOP, BOTTOM = 1.30, -1.95  # crown without hair; the neck ends inside the collar
AZIMUTH = 2.2  # the head is built for |azimuth| up to this; its back is never seen

EYE_X, EYE_Y, EYE_HALF = 0.325, 0.22, 0.155  # centre of the right-hand lid opening, half its width
BROW_X, BROW_LENGTH = 0.125, 0.415  # inner end of the right-hand brow, length along x
LID_UP, LID_DOWN = 0.064, 0.046  # height of the open lids over and under the line of the corners
MOUTH_Y, MOUTH_HALF = -0.50, 0.255
CHIN_Y = -0.90
JAW_HINGE = np.array([0.0, -0.02, -0.02])

#               y      half width   front    exponent of the cross-section
_SECTIONS = np.array([
    (0.45, 0.745, 0.915, 2.30), (0.30, 0.728, 0.885, 2.30), (0.10, 0.705, 0.880, 2.25), (-0.10, 0.678, 0.895, 2.15),
    (-0.27, 0.655, 0.915, 2.10), (-0.50, 0.605, 0.935, 2.05), (-0.65, 0.555, 0.925, 2.05), (-0.80, 0.475, 0.905, 2.05),
    (-0.88, 0.400, 0.865, 2.00), (-0.95, 0.290, 0.770, 2.00), (-1.02, 0.180, 0.560, 2.00), (-1.10, 0.120, 0.300, 2.00),
    (-1.95, 0.100, 0.100, 2.00)])[::-1]  # fmt: skip
_WIDTH, _FRONT, _POWER = (PchipInterpolator(_SECTIONS[:, 0], _SECTIONS[:, i]) for i in (1, 2, 3))
_NECK_WIDTH = PchipInterpolator([-1.95, -1.5, -1.3, -1.0, -0.6, 1.5], [0.78, 0.525, 0.480, 0.470, 0.47, 0.10])
_NECK_FRONT = PchipInterpolator([-1.95, -1.5, -1.0, -0.6, 1.5], [0.33, 0.26, 0.31, 0.30, 0.0])
_NOSE_HEIGHT = PchipInterpolator(
    [-0.37, -0.320, -0.285, -0.250, -0.20, -0.13, 0.0, 0.15, 0.26, 0.34, 0.45],
    [0.0, 0.012, 0.050, 0.115, 0.192, 0.213, 0.165, 0.098, 0.050, 0.030, 0.0])  # fmt: skip
_NOSE_WIDTH = PchipInterpolator([-0.36, -0.22, -0.15, 0.0, 0.15, 0.30, 0.45], [0.120, 0.115, 0.112, 0.092, 0.078, 0.085, 0.16])
_HAIRLINE = PchipInterpolator(
    [0.0, 0.30, 0.60, 0.78, 0.92, 1.04, 1.15, 1.28, 1.40, 1.52, 1.66, 1.85, 2.2],
    [0.92, 0.95, 0.91, 0.80, 0.60, 0.40, 0.18, -0.02, -0.06, 0.20, 0.10, -0.35, -0.62])  # fmt: skip


def bump(x: np.ndarray, y: np.ndarray, cx: float, cy: float, sx: float, sy: float) -> np.ndarray:
    """A Gaussian hill of height 1, mirrored in x."""
    return np.exp(-(((np.abs(x) - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)


def smoothstep(low: float, high: float, value: np.ndarray) -> np.ndarray:
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def lip_top(x: np.ndarray) -> np.ndarray:
    """Upper edge of the red of the upper lip (Cupid's bow) over x."""
    s = np.clip(np.abs(x) / MOUTH_HALF, 0, 1)
    return MOUTH_Y + 0.072 * (1 - s**1.7) + 0.016 * np.exp(-(((s - 0.27) / 0.17) ** 2)) - 0.004


def lip_bottom(x: np.ndarray) -> np.ndarray:
    """Lower edge of the red of the lower lip over x."""
    s = np.clip(np.abs(x) / MOUTH_HALF, 0, 1)
    return MOUTH_Y - 0.102 * (1 - s**2.2) ** 0.9


def brow_middle(along: np.ndarray) -> np.ndarray:
    """Height of the brow's middle line; along: 0 at its inner, 1 at its outer end."""
    return 0.389 + 0.062 * np.sin(np.clip(along, 0, 1) * 2.3)


def nasolabial(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """The fold from the wing of the nose to beside the mouth: 1 along its line."""
    across = (np.abs(x) - (0.20 - 0.32 * (y + 0.25))) / width
    return np.exp(-(across**2)) * smoothstep(-0.52, -0.40, y) * smoothstep(-0.14, -0.24, y)


def hairline(azimuth: np.ndarray) -> np.ndarray:
    """Height y above which the skin carries hair."""
    return _HAIRLINE(np.abs(azimuth)) - 0.10 * azimuth * np.exp(-((azimuth / 0.55) ** 2))


def _relief(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far the features stand out of the plain section, along z."""
    nose_width = _NOSE_WIDTH(np.clip(y, -0.36, 0.45))
    nose = _NOSE_HEIGHT(np.clip(y, -0.37, 0.45)) * np.exp(-(np.abs(x / nose_width) ** 2.0))
    wings = 0.085 * bump(x, y, 0.120, -0.210, 0.055, 0.058) + 0.028 * bump(x, y, 0, -0.160, 0.080, 0.065)
    nostrils = -0.045 * bump(x, y, 0.066, -0.258, 0.030, 0.018)
    sockets = -0.095 * bump(x, y, 0.31, 0.225, 0.19, 0.125) - 0.030 * bump(x, y, 0.17, 0.25, 0.06, 0.08)
    balls = 0.058 * bump(x, y, EYE_X, EYE_Y + 0.012, 0.125, 0.088)
    brows = 0.022 * bump(x, y, 0.28, 0.41, 0.24, 0.085) + 0.015 * bump(x, y, 0.0, 0.44, 0.10, 0.09)
    cheeks = 0.045 * bump(x, y, 0.44, -0.05, 0.16, 0.15) - 0.020 * bump(x, y, 0.47, -0.42, 0.14, 0.16)
    fold = -0.016 * nasolabial(x, y, 0.035)
    muzzle = 0.050 * bump(x, y, 0.0, -0.48, 0.26, 0.20)
    s = np.clip(np.abs(x) / MOUTH_HALF, 0, 1)
    body = np.sqrt(1 - s**2.5)
    upper = 0.040 * body * np.exp(-(((y - MOUTH_Y - 0.036) / 0.036) ** 2)) + 0.012 * bump(x, y, 0.0, MOUTH_Y + 0.02, 0.05, 0.022)
    lower = 0.052 * body * np.exp(-(((y - MOUTH_Y + 0.050) / 0.042) ** 2))
    seam = -0.022 * body**0.5 * np.exp(-(((y - MOUTH_Y) / 0.016) ** 2))
    corner = -0.018 * bump(x, y, MOUTH_HALF + 0.015, MOUTH_Y, 0.035, 0.035)
    philtrum = -0.012 * bump(x, y, 0.0, -0.36, 0.028, 0.05) + 0.008 * bump(x, y, 0.048, -0.37, 0.025, 0.05)
    chin = -0.030 * bump(x, y, 0.0, -0.655, 0.20, 0.045) + 0.055 * bump(x, y, 0.0, -0.80, 0.15, 0.095)
    upper_face = nose + wings + nostrils + sockets + balls + brows + cheeks
    return upper_face + fold + muzzle + upper + lower + seam + corner + philtrum + chin


def _radius(azimuth: np.ndarray, y: np.ndarray) -> np.ndarray:
    dome = np.clip((y - 0.45) / (TOP - 0.45), 0.0, 1.0)
    shrink = np.maximum(1 - dome**2.3, 1e-9) ** (1 / 2.3)
    below = np.minimum(y, 0.45)
    width = _WIDTH(below) * shrink * (1 + 0.03 * dome)
    front = (_FRONT(below) - AXIS_Z) * shrink
    depth = np.where(np.abs(azimuth) < np.pi / 2, front, 0.92 * shrink)
    power = _POWER(below)
    across, along = np.abs(np.sin(azimuth)) / np.maximum(width, 1e-6), np.abs(np.cos(azimuth)) / np.maximum(depth, 1e-6)
    head = (across**power + along**power) ** (-1 / power)
    nw, nf = _NECK_WIDTH(np.clip(y, -1.95, 1.5)), _NECK_FRONT(np.clip(y, -1.95, 1.5)) - AXIS_Z
    neck = 1 / np.sqrt((np.sin(azimuth) / nw) ** 2 + (np.cos(azimuth) / nf) ** 2)
    joined = 0.5 * (head + neck + np.sqrt((head - neck) ** 2 + 0.07**2))
    return np.where(y > -0.2, head, head + (joined - head) * smoothstep(-0.2, -0.6, y))


def skin_point(azimuth: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(..., 3) neutral skin without hair at chart coordinates of any shape."""
    azimuth, y = np.broadcast_arrays(np.asarray(azimuth, float), np.asarray(y, float))
    radius = _radius(azimuth, y)
    x = radius * np.sin(azimuth)
    facing = smoothstep(1.5, 1.1, np.abs(azimuth)) * smoothstep(-1.05, -0.92, y)
    return np.stack([x, y, AXIS_Z + radius * np.cos(azimuth) + facing * _relief(x, y)], -1)


def chart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Azimuth of the skin point in front at (x, y): the inverse of `skin_point` by bisection."""
    x, y = np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float))
    low, high = np.full(x.shape, -1.5), np.full(x.shape, 1.5)
    for _ in range(26):
        middle = 0.5 * (low + high)
        right = _radius(middle, y) * np.sin(middle) < x
        low, high = np.where(right, middle, low), np.where(right, high, middle)
    return 0.5 * (low + high)


def lids(along: np.ndarray, blink: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heights over the eye's centre of the upper and the lower lid's edge.

    along: -1 at the inner to 1 at the outer corner; blink 0 open .. 1 closed (the lids then meet).
    """
    s = np.clip(along, -1, 1)
    tilt = 0.012 * s
    up = LID_UP * (1 - np.abs(s - 0.12 * (1 - s * s)) ** 2.1) ** 0.75 + tilt
    down = -LID_DOWN * (1 - np.abs(s + 0.10 * (1 - s * s)) ** 2.0) ** 0.9 + tilt
    closed = down + 0.14 * (up - down)
    return up + (closed - up) * blink, down + (closed - down) * blink
