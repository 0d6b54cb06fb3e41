"""What the 478-point face mesh says about a frame: the head's own coordinates, the oval, and the polygons of its parts."""

from __future__ import annotations

import cv2
import numpy as np
from scipy.signal import savgol_filter

from utils.constants import LOWER_LIP, MOUTH, SKIN, UPPER_LIP

LEFT_BROW, RIGHT_BROW, LEFT_EYE, RIGHT_EYE, LEFT_EAR, RIGHT_EAR, NOSE = 2, 3, 4, 5, 7, 8, 10  # left = the viewer's left

# MediaPipe face mesh indices, each a closed polygon
OVAL = (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150, 136,
        172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109)  # fmt: skip
_LIPS_OUTER_LOWER = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)
_LIPS_OUTER_UPPER = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
_LIPS_INNER_LOWER = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
_LIPS_INNER_UPPER = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
LIPS = _LIPS_OUTER_LOWER + _LIPS_OUTER_UPPER[-2:0:-1]
PARTS = (  # painted in this order
    (NOSE, (168, 193, 245, 114, 126, 209, 129, 98, 97, 2, 326, 327, 358, 429, 355, 343, 465, 417)),
    (LEFT_BROW, (70, 63, 105, 66, 107, 55, 65, 52, 53, 46)),
    (RIGHT_BROW, (300, 293, 334, 296, 336, 285, 295, 282, 283, 276)),
    (LEFT_EYE, (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246)),
    (RIGHT_EYE, (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466)),
    (UPPER_LIP, _LIPS_OUTER_UPPER + _LIPS_INNER_UPPER[::-1]),
    (LOWER_LIP, _LIPS_OUTER_LOWER + _LIPS_INNER_LOWER[::-1]),
    (MOUTH, _LIPS_INNER_LOWER + _LIPS_INNER_UPPER[-2:0:-1]),
)
RIGID = (10, 109, 338, 67, 297, 103, 332, 54, 284, 21, 251, 162, 389, 127, 356, 168, 6, 197, 195, 5, 4, 33, 133, 263, 362, 234, 454,
         93, 323, 50, 280, 117, 346)  # fmt: skip
CHIN, FOREHEAD = 152, 10
SIDES, BRIDGE = (234, 127, 454, 356), (168, 6, 197, 195, 5, 4)


def smooth_landmarks(points: np.ndarray) -> np.ndarray:
    """(F, 478, 2) pixels with the detector's jitter removed; NaN rows stay NaN. Zero phase, so lips do not lag.

    Savitzky-Golay (window 5, order 2) within each unbroken run of frames.
    """
    smooth = np.array(points[..., :2], np.float32)
    found = np.isfinite(smooth[:, 0, 0])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], found.astype(np.int8), [0]])))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        if last - first >= 5:
            smooth[first:last] = savgol_filter(smooth[first:last], 5, 2, axis=0)
    return smooth


class HeadFrame:
    """The head's own coordinates in the picture, rigid against the jaw: origin between the eyes, u to the viewer's right,
    v down, unit = height of the mean face mesh (forehead top to chin)."""

    def __init__(self, points: np.ndarray):
        """`points` (F, 478, 2) pixels, NaN where no face."""
        shapes = points[np.isfinite(points[:, 0, 0])]
        rigid = shapes[:, RIGID]
        centred = rigid - rigid.mean(1, keepdims=True)
        size = np.sqrt((centred**2).sum((1, 2), keepdims=True) / len(RIGID))
        mean = (centred / size).mean(0)
        # turn and scale the mean shape so that the eyes are level and the mesh is 1 high
        full = ((shapes - rigid.mean(1, keepdims=True)) / size).mean(0)
        across = full[[263, 362]].mean(0) - full[[33, 133]].mean(0)
        turn = np.conj(_complex(across) / abs(_complex(across)))
        origin = _complex(full[[33, 133, 263, 362]].mean(0))
        height = abs(_complex(full[CHIN] - full[FOREHEAD]))
        self._mean = (_complex(mean) - origin) * turn / height
        self.shape = (_complex(full) - origin) * turn / height  # (478,) complex u + iv: the mean mesh

    def to_pixels(self, points: np.ndarray) -> tuple[complex, complex]:
        """Similarity (a, b) of one frame, least squares over the rigid points: pixel (x + iy) = a (u + iv) + b."""
        target = _complex(points[list(RIGID)])
        source = self._mean
        centre, mean = target.mean(), source.mean()
        a = np.vdot(source - mean, target - centre) / np.vdot(source - mean, source - mean)
        return complex(a), complex(centre - a * mean)

    def ear_shift(self, points: np.ndarray, a: complex, b: complex) -> float:
        """How far down (v) the ears lie from where they are on average: a head that looks up lowers them against the face.

        Measured on the sides of the face, which lie two thirds as far behind the nose as the ears do.
        """
        moved = ((_complex(points) - b) / a - self.shape).imag
        return 1.5 * float(moved[list(SIDES)].mean() - moved[list(BRIDGE)].mean())


def _complex(points: np.ndarray) -> np.ndarray:
    return points[..., 0] + 1j * points[..., 1]


def fill(polygon: np.ndarray, height: int, width: int, scale: float = 1.0) -> np.ndarray:
    """(height, width) uint8 0/1 of a polygon (K, 2) given in pixel-centre coordinates +0.5, scaled by `scale`; sub-pixel exact."""
    mask = np.zeros((height, width), np.uint8)
    corners = np.round((polygon * scale - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(mask, [corners], 1, lineType=cv2.LINE_8, shift=4)
    return mask


def paint_parts(classes: np.ndarray, points: np.ndarray) -> None:
    """Paint brows, eyes, nose, lips and mouth into (H, W) `classes` where it says skin (hair over an eye stays hair)."""
    height, width = classes.shape
    for label, indices in PARTS:
        inside = fill(points[list(indices)], height, width).astype(bool)
        classes[inside & ((classes >= SKIN) & (classes <= LOWER_LIP))] = label
