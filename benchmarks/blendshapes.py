"""Geometric blendshapes (no network) against MediaPipe's on the 7 upper-face channels: mean absolute error a clip.

    python benchmarks/blendshapes.py data/a data/b ... [--fit]

Needs folders that process.py has brought to stage 2 at least. --fit fits the brows' curves to all the clips, prints them as
data_utils/blendshape_capture.py has them, and says how far curves fitted without a clip are off on it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils.blendshape_capture import BACKENDS, brow_features, logistic
from data_utils.landmarks import read_dense
from utils.constants import UPPER_FACE_COLUMNS, UPPER_FACE_NAMES
from utils.dataset_folder import DatasetFolder
from utils.errors import command_line

CURVES = {"BROW_DOWN": (0, 1), "BROW_OUTER": (3, 4), "BROW_INNER": (2,)}  # columns among the 7, of the left and the right side
SHRINK, EVERY = 0.15, 5  # weight of the prior on standardised slopes; frames taken: every which


def fit(features: list[np.ndarray], scores: list[np.ndarray]) -> np.ndarray:
    """Curve (offset, slopes) that errs least, robustly, every clip weighing alike."""
    x = np.concatenate(features)
    middle, spread = x.mean(0), x.std(0)
    x, y = np.c_[np.ones(len(x)), (x - middle) / spread], np.concatenate(scores)
    weight = np.concatenate([np.full(len(clip), len(clip) ** -0.5) for clip in scores])

    def residual(q: np.ndarray) -> np.ndarray:
        return np.r_[weight * (1 / (1 + np.exp(-np.clip(x @ q, -30, 30))) - y), SHRINK * q[1:]]

    q = least_squares(residual, np.zeros(x.shape[1]), loss="soft_l1", f_scale=0.02, max_nfev=100).x
    slopes = q[1:] / spread
    return np.r_[q[0] - slopes @ middle, slopes]


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--fit", action="store_true")
    args = parser.parse_args(argv)
    points, learned = [], []
    for path in args.folders:
        dense = read_dense(DatasetFolder(path))
        points.append(dense["points"][dense["found"]].astype(float))
        learned.append(BACKENDS["mediapipe"].run(dense)[dense["found"]][:, UPPER_FACE_COLUMNS])
    errors = np.zeros((len(points), len(UPPER_FACE_COLUMNS)))
    for k, face in enumerate(points):
        errors[k] = np.abs(BACKENDS["geometric"].run({"points": face})[:, UPPER_FACE_COLUMNS] - learned[k]).mean(0)
    if args.fit:
        for name, columns in CURVES.items():
            sides = [[brow_features(face, side)[::EVERY] for face in points] for side in range(2)]
            if len(columns) == 1:
                sides = [[(left + right) / 2 for left, right in zip(*sides, strict=True)]]
            scores = [[clip[::EVERY, column] for clip in learned] for column in columns]
            print(f"{name} = ({', '.join(f'{value:.4g}' for value in fit(sum(sides, []), sum(scores, [])))})")
            for k in range(len(points)):
                others = [[clip for i, clip in enumerate(clips) if i != k] for clips in (*sides, *scores)]
                curve = fit(sum(others[: len(sides)], []), sum(others[len(sides) :], []))
                for side, score, column in zip(sides, scores, columns, strict=True):
                    errors[k, column] = np.abs(logistic(tuple(curve), side[k]) - score[k]).mean()
    print(f"| clip{', left out of the fit' if args.fit else ''} | mean | {' | '.join(UPPER_FACE_NAMES)} |\n|---|{'---|' * 8}")
    for path, row in zip([*args.folders, Path("mean")], [*errors, errors.mean(0)], strict=True):
        print(f"| {path.name} | {row.mean():.3f} | {' | '.join(f'{value:.3f}' for value in row)} |")


if __name__ == "__main__":
    main()
