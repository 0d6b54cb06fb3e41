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

VERSION = 1
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

# Logistic curves (offset, slope) from a ratio to a score, fitted to MediaPipe's on 17 clips; mean error 0.03 to 0.14 a channel
BLINK, BROW_INNER, BROW_OUTER, BROW_DOWN, JAW_OPEN = (1.52, -12.5), (-9.58, 42.8), (-12.9, 47.8), (2.82, -26.2), (-3.52, 12.2)
# vertices of the subject's left, then right side: eye (inner, outer corner), its lid pairs, inner and outer brow
SIDES = (
    ((362, 263), ((386, 374), (385, 380), (387, 373)), (336, 285), (334, 293, 283, 282)),
    ((133, 33), ((159, 145), (158, 153), (160, 144)), (107, 55), (105, 63, 53, 52)),
)


def geometric_scores(points: np.ndarray) -> np.ndarray:
    """(F, 478, 3) points -> (F, 52): the 7 upper-face columns and jawOpen, all in distances between the outer eye corners."""

    def logistic(curve: tuple[float, float], ratio: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(curve[0] + curve[1] * ratio)))

    def apart(a: int, b: int) -> np.ndarray:
        return np.linalg.norm(points[:, a] - points[:, b], axis=-1)

    across = points[:, 263] - points[:, 33]
    unit = np.linalg.norm(across, axis=-1)
    across = across / unit[:, None]
    up = points[:, 168] - points[:, 2]  # nose bridge over nose base, made square to the eyes
    up = up - (up * across).sum(-1, keepdims=True) * across
    up /= np.linalg.norm(up, axis=-1, keepdims=True)
    result = np.where(np.isnan(unit), np.nan, 0)[:, None].repeat(52, axis=1)
    inner_brows = []
    for side, (corners, lids, inner, outer) in enumerate(SIDES):
        eye = points[:, corners].mean(1)
        inner_height, outer_height = (((points[:, brow].mean(1) - eye) * up).sum(-1) / unit for brow in (inner, outer))
        inner_brows.append(inner_height)
        result[:, BLINK_COLUMNS[side]] = logistic(BLINK, sum(apart(*lid) for lid in lids) / 3 / apart(*corners))
        result[:, UPPER_FACE_COLUMNS[side]] = logistic(BROW_DOWN, (inner_height + outer_height) / 2)
        result[:, UPPER_FACE_COLUMNS[3 + side]] = logistic(BROW_OUTER, outer_height)
    result[:, UPPER_FACE_COLUMNS[2]] = logistic(BROW_INNER, sum(inner_brows) / 2)
    result[:, JAW_OPEN_COLUMN] = logistic(JAW_OPEN, apart(13, 14) / unit)
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
