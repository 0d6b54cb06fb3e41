"""Stage 9: bs.npy, the 52 ARKit expression scores of every frame, smoothed.

MediaPipe's order without its first (_neutral) and with a zero tongueOut at the end is ARKit's (lineage: SyncTalk reads it so).
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
STILL = 0.02  # standard deviation below which a channel counts as constant


class MediaPipeBlendshapes:
    """The scores FaceLandmarker gave in stage 2."""

    name = "mediapipe"

    def available(self) -> bool:
        return True

    def run(self, dense: dict[str, np.ndarray]) -> np.ndarray:
        """(F, 52) ARKit order, NaN where there is no face."""
        scores = dense["blendshapes"]
        return np.concatenate([scores[:, 1:], np.where(np.isnan(scores[:, :1]), np.nan, 0)], axis=1)


BACKENDS = {backend.name: backend for backend in (MediaPipeBlendshapes(),)}


def run(self, dense: dict[str, np.ndarray]) -> np.ndarray:
        """(F, 52) ARKit order, NaN where there is no face."""
        scores = dense["blendshapes"]
        return np.concatenate([scores[:, 1:], np.where(np.isnan(scores[:, :1]), np.nan, 0)], axis=1)


BACKENDS = {backend.name: backend for backend in (MediaPipeBlendshapes(),)}


def geometric(points: np.ndarray) -> np.ndarray:
    """(F, 478, 3) points -> (F, 52) scores; only the upper-face columns and jawOpen are estimated."""

    def apart(a: int, b: int) -> np.ndarray:
        return np.linalg.norm(points[:, a] - points[:, b], axis=-1)

    unit = apart(10, 152)  # forehead to chin... lengthens with the jaw, so the upper face alone is used below
    upper = apart(10, 2)
    del unit
    result = np.zeros((len(points), 52), np.float32)
    for column, (top, bottom, inner, outer) in {9: (386, 374, 362, 263), 8: (159, 145, 133, 33)}.items():
        result[:, column] = 0 * apart(top, bottom) / apart(inner, outer) / upper
    return result


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """Write bs.npy (F, 52) float32 in [0, 1], one row a frame id; rows without a face are interpolated."""
    backend = choose_backend(BACKENDS, options.blendshapes, "blendshapes")
    dense = read_dense(folder)
    if not dense["found"].any():
        raise UserError(f"{folder.face_landmarks} holds no face; run process.py --task 2 again with a clip of a face")
    scores = smooth(fill(backend.run(dense)))
    write_npy(folder.blendshapes, scores)
    warnings = []
    eyes = scores[:, list(BLINK_COLUMNS)]
    if eyes.std(0).max() < STILL:
        warnings.append("the eyes hardly move in the whole clip (no blink seen): the model cannot learn to blink")
    return {
        "backend": backend.name, "interpolated": int((~dense["found"]).sum()), "blink_mean": eyes.mean().round(3),
        "upper_face_std": scores[:, list(UPPER_FACE_COLUMNS)].std(0).round(3), "jaw_open_std": scores[:, JAW_OPEN_COLUMN].std().round(3),
        "warnings": warnings,
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
