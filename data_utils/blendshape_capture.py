"""Stage 9: bs.npy, the 52 ARKit expression scores of every frame, smoothed.

MediaPipe's order without its first (_neutral) and with a zero tongueOut at the end is ARKit's, which the readers expect.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.signal import savgol_filter

from data_utils.landmarks import choose_backend, read_dense
from utils.constants import BLINK_COLUMNS, JAW_OPEN_COLUMN, UPPER_FACE_COLUMNS
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import write_npy

VERSION = 2  # 2: geometric brows in proportion to the face
WINDOW, ORDER = 5, 3  # Savitzky-Golay
STILL = 0.02  # standard deviation below which the eyes count as constant


class MediaPipeBlendshapes:
    """The scores FaceLandmarker gave in stage 2."""

    name = "mediapipe"

    def available(self) -> bool:
        return True

    def run(self, dense: dict[str, np.ndarray]) -> np.ndarray:
        """(F, 52) ARKit order, NaN where there is no face."""
        scores = dense["blendshapes"]
        return np.concatenate([scores[:, 1:], 0 * scores[:, :1]], axis=1)


class GeometricBlendshapes:
    """Blinks, brows and jaw from distances between the dense points; the other channels are zero."""

    name = "geometric"

    def available(self) -> bool:
        return True

    def run(self, dense: dict[str, np.ndarray]) -> np.ndarray:
        """(F, 52) ARKit order, NaN where there is no face."""
        return geometric_scores(dense["points"])


BACKENDS = {backend.name: backend for backend in (MediaPipeBlendshapes(), GeometricBlendshapes())}

# Logistic curves: (offset, slope) from a ratio to a score, for blinks and jaw; for the brows (offset, a slope a feature of
# `brow_features`). benchmarks/blendshapes.py fits the latter to MediaPipe's scores and says how far they are off on unseen clips.
BLINK, JAW_OPEN = (1.52, -12.5), (-3.52, 12.2)
BROW_DOWN = (5.242, 0.7656, -36.45, -2.198, 1.014, -13.3, 0.8111, -13.92, 5.184, 17.51, 0.4384, -11, -2.605, 6.964)
BROW_OUTER = (-0.2575, 1.798, 24.9, 10.55, -19.01, 34.64, -8.064, 5.37, -11.26, -11.71, -1.907, -5.408, 6.242, -2.473)
BROW_INNER = (2.773, 20.27, 3.473, 1.44, 20.27, 3.473, 1.44, -10.5, -5.631, -16.44, -1.38, 6.36, 6.113, -10.26)
# vertices of the subject's left, then right side: eye (inner, outer corner), its lid pairs, inner and outer brow
SIDES = (
    ((362, 263), ((386, 374), (385, 380), (387, 373)), (336, 285), (334, 293, 283, 282)),
    ((133, 33), ((159, 145), (158, 153), (160, 144)), (107, 55), (105, 63, 53, 52)),
)
EYE_CORNERS, FOREHEAD, CHIN, BRIDGE, NOSE_BASE, GLABELLA = (33, 263), 10, 152, 168, 2, 9


class _Face:
    """Distances and heights of points (F, 478, 3), in distances between the outer eye corners."""

    def __init__(self, points: np.ndarray):
        self.points = points
        across = points[:, 263] - points[:, 33]
        self.unit = np.linalg.norm(across, axis=-1)
        across = across / self.unit[:, None]
        up = points[:, BRIDGE] - points[:, NOSE_BASE]  # made square to the eyes
        up = up - (up * across).sum(-1, keepdims=True) * across
        self.up = up / np.linalg.norm(up, axis=-1, keepdims=True)
        self.forward = np.cross(across, self.up)

    def at(self, indices: int | tuple[int, ...]) -> np.ndarray:
        """(F, 3) a point, or the mean of several."""
        return self.points[:, [indices] if isinstance(indices, int) else list(indices)].mean(1)

    def height(self, over: int | tuple[int, ...], under: int | tuple[int, ...]) -> np.ndarray:
        return ((self.at(over) - self.at(under)) * self.up).sum(-1) / self.unit

    def apart(self, a: int, b: int) -> np.ndarray:
        return np.linalg.norm(self.points[:, a] - self.points[:, b], axis=-1) / self.unit

    def eye(self, side: int) -> np.ndarray:
        """How far the lids are apart, in widths of the eye."""
        corners, lids, _, _ = SIDES[side]
        return sum(self.apart(*lid) for lid in lids) / 3 / self.apart(*corners)


def brow_features(points: np.ndarray, side: int) -> np.ndarray:
    """(F, 13) of the brow on a side (0 the subject's left) in points (F, 478, 3): heights of its ends over the eye and how open the
    eye is, the same of the other side, then what tells a raised brow from a high one: proportions of this face, and its pitch."""
    face, columns = _Face(points), []
    for k in (side, 1 - side):
        corners, _, inner, outer = SIDES[k]
        columns += [face.height(inner, corners), face.height(outer, corners), face.eye(k)]
    inner = (336, 107)
    columns += [
        face.apart(*inner), face.height(BRIDGE, NOSE_BASE), face.height(FOREHEAD, inner), face.height(FOREHEAD, CHIN),
        ((face.at(inner) - face.at(EYE_CORNERS)) * face.forward).sum(-1) / face.unit,
        (face.at(BRIDGE) - face.at(NOSE_BASE))[:, 2] / face.unit, face.height(GLABELLA, EYE_CORNERS),
    ]  # fmt: skip
    return np.stack(columns, 1)


def logistic(curve: tuple[float, ...], features: np.ndarray) -> np.ndarray:
    """(F,) scores of features (F, N) by a curve (offset, N slopes)."""
    return 1 / (1 + np.exp(-(curve[0] + features @ np.array(curve[1:]))))


def geometric_scores(points: np.ndarray) -> np.ndarray:
    """(F, 478, 3) points -> (F, 52): the 7 upper-face columns and jawOpen, NaN where there is no face."""
    face = _Face(points)
    result = np.where(np.isnan(face.unit), np.nan, 0)[:, None].repeat(52, axis=1)
    brows = [brow_features(points, side) for side in range(2)]
    for side in range(2):
        result[:, BLINK_COLUMNS[side]] = logistic(BLINK, face.eye(side)[:, None])
        result[:, UPPER_FACE_COLUMNS[side]] = logistic(BROW_DOWN, brows[side])
        result[:, UPPER_FACE_COLUMNS[3 + side]] = logistic(BROW_OUTER, brows[side])
    result[:, UPPER_FACE_COLUMNS[2]] = logistic(BROW_INNER, sum(brows) / 2)
    result[:, JAW_OPEN_COLUMN] = logistic(JAW_OPEN, face.apart(13, 14)[:, None])
    return result


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """Write bs.npy (F, 52) float32 in [0, 1], one row a frame id; rows without a face are interpolated."""
    backend = choose_backend(BACKENDS, options.blendshapes, "blendshapes")
    dense = read_dense(folder)
    if not dense["found"].any():
        raise UserError(f"{folder.face_landmarks} holds no face; run process.py --task 2 again with a clip of a face")
    scores = smooth(fill(backend.run(dense)))
    write_npy(folder.blendshapes, scores)
    eyes = scores[:, list(BLINK_COLUMNS)]
    warnings = []
    if eyes.std(0).max() < STILL:
        warnings.append("the eyes hardly move in the whole clip (no blink is seen): the model cannot learn to blink")
    return {
        "backend": backend.name, "interpolated": int((~dense["found"]).sum()), "blink_mean": eyes.mean(0).round(3),
        "upper_face_std": scores[:, list(UPPER_FACE_COLUMNS)].std(0).round(3),
        "jaw_open_std": scores[:, JAW_OPEN_COLUMN].std().round(3), "warnings": warnings,
    }  # fmt: skip


def fill(rows: np.ndarray) -> np.ndarray:
    """(F, C) with NaN rows -> linearly interpolated over frames, the ends held."""
    known = np.flatnonzero(~np.isnan(rows).any(1))
    return np.column_stack([np.interp(np.arange(len(rows)), known, column[known]) for column in rows.T])


def smooth(rows: np.ndarray) -> np.ndarray:
    """Savitzky-Golay over time (no lag), back into [0, 1], float32."""
    if len(rows) >= WINDOW:
        rows = savgol_filter(rows, WINDOW, ORDER, axis=0)
    return np.clip(rows, 0.0, 1.0).astype(np.float32)
