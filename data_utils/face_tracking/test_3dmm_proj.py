"""Look at the face tracking: the fitted mesh and the pose axes over the video, error curves below -> 3dmm_render.mp4.

    python data_utils/face_tracking/test_3dmm_proj.py --path data/x

Green: the mesh with the tracker's pose. Axes: the pose that training uses (the tracker's own with --use_3dmm), x red, y green, z
blue. Curves: error of the landmarks (yellow) and second difference of the rigid points (cyan), pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np

from data_utils.bundle_adjustment import read_bundle_adjustment
from data_utils.face_tracking.params import read_fit, read_landmarks
from data_utils.pose_solver import project
from data_utils.transforms import pose_file
from utils.dataset_folder import DatasetFolder
from utils.errors import command_line
from utils.image import read_rgb
from utils.progress import progress
from utils.video import VideoWriter

STRIP, AXIS = 120, 0.6  # height of the curves, px; length of the axes, dm
CURVES = (("landmark error", (255, 220, 0), 4.0), ("second difference", (0, 220, 255), 2.0))  # label, colour, px at the top


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="data set folder")
    parser.add_argument("--face_model", default="auto")
    options = parser.parse_args()
    folder = DatasetFolder(options.path)
    fit = read_fit(folder, options.face_model)
    refined = pose_file(folder) == folder.bundle_adjustment
    poses, focal = read_bundle_adjustment(folder) if refined else (fit.poses, fit.focal)

    ids = np.array(folder.valid_ids())
    height, width = read_rgb(folder.frame(int(ids[0]))).shape[:2]
    centre = np.array([width / 2, height / 2])
    model, count = fit.model, len(fit.poses.translation)
    landmarks = project(fit.landmarks(), fit.poses, fit.focal, centre)
    error = np.linalg.norm(landmarks - read_landmarks(folder)[:, model.landmark_ids, :2], axis=2)
    error = error[:, model.landmark_noise <= 1].mean(1)  # of the exact ones
    shake = np.zeros(count)
    rigid = project(model.mean[model.rigid], poses, focal, centre)
    shake[1:-1] = np.linalg.norm(np.diff(rigid, 2, axis=0), axis=2).mean(1)
    strip = _draw_curves([error, shake], width)

    edges = np.unique(np.sort(np.concatenate([model.triangles[:, p] for p in ([0, 1], [1, 2], [2, 0])]), axis=1), axis=0)
    axes = project(np.vstack([np.zeros(3), AXIS * np.eye(3)]), poses, focal, centre)
    target = folder.root / "3dmm_render.mp4"
    with VideoWriter(target, width // 2 * 2, (height + STRIP) // 2 * 2) as writer:
        for i in progress(range(count), label="3dmm_render"):
            frame = np.concatenate([read_rgb(folder.frame(i)), strip])
            pixels = project(fit.vertices(slice(i, i + 1)), fit.poses[i : i + 1], fit.focal, centre)[0]
            _draw_lines(frame, pixels[edges], (90, 255, 90))
            for a in range(3):
                _draw_lines(frame, axes[i, [0, 1 + a]][None], tuple(int(255 * (a == c)) for c in range(3)), 2)
            at = int(i / max(count - 1, 1) * (width - 1))
            frame[height:, at] = 255
            text = f"{i}  error {error[i]:.2f}  shake {shake[i]:.2f} px"
            cv2.putText(frame, text, (6, height + STRIP - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
            writer.add(frame[: frame.shape[0] // 2 * 2, : width // 2 * 2])
    print(target)


def _draw_lines(image: np.ndarray, segments: np.ndarray, colour: tuple[int, ...], thickness: int = 1) -> None:
    # our pixel centres lie at +0.5; four fractional bits for OpenCV
    cv2.polylines(image, list(np.round((segments - 0.5) * 16).astype(np.int32)), False, colour, thickness, cv2.LINE_AA, 4)


def _draw_curves(values: list[np.ndarray], width: int) -> np.ndarray:
    strip = np.full((STRIP, width, 3), 24, np.uint8)
    for k, (curve, (label, colour, top)) in enumerate(zip(values, CURVES, strict=True)):
        y = (STRIP - 1) * (1 - np.clip(np.nan_to_num(curve, nan=0.0) / top, 0, 1))
        x = np.linspace(0, width - 1, len(curve))
        cv2.polylines(strip, [np.stack([x, y], 1).astype(np.int32)], False, colour, 1, cv2.LINE_AA)
        place = (6 + k * width // 2, 14)
        cv2.putText(strip, f"{label}, 0..{top:g} px", place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)
    return strip


if __name__ == "__main__":
    main()
