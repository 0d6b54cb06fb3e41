"""How far does the embedded face parsing agree with a parsing network? IoU of each region, per clip and over all clips.

    python benchmarks/parsing.py data/a data/b ... [--reference bisenetv2] [--frames 24] [--sheets FOLDER]

Needs folders that process.py has brought to stage 2 at least, and writes nothing there. Both back ends parse the same frames,
spread over each clip. A clip's figure is the median over its frames, the last row the median over the clips; regions of which the
reference sees less than half a percent of the picture are left out. `flicker`: pixels whose class changes between two frames in
which the picture there does not, as a share of the person (embedded back end alone). The last but one row is the median over all
frames alike. --sheets writes a picture a clip: frame,
embedded, reference, differences (red: only embedded, blue: only reference, green: other class).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils.face_parsing import choose
from data_utils.face_parsing.clip import Clip
from utils.constants import BACKGROUND, CLOTH, HAIR, HAT, HEAD_CLASSES, NECK_CLASSES
from utils.dataset_folder import DatasetFolder
from utils.errors import command_line
from utils.image import write_rgb

REGIONS = {"head": HEAD_CLASSES, "hair": (HAIR, HAT), "neck": NECK_CLASSES, "torso": (CLOTH,)}
SMALLEST = 0.005  # of the picture
UNCHANGED = 3  # grey levels, blurred
SHOWN = 4  # frames on a sheet
COLOURS = np.random.default_rng(5).integers(40, 256, (19, 3)).astype(np.uint8) * (np.arange(19) > BACKGROUND)[:, None]


def overlap(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """IoU of each region; NaN where the reference has hardly any of it."""
    result = []
    for classes in REGIONS.values():
        a, b = np.isin(ours, classes), np.isin(theirs, classes)
        result.append((a & b).sum() / (a | b).sum() if b.mean() > SMALLEST else np.nan)
    return result


def flicker(before: np.ndarray, after: np.ndarray, pictures: list[np.ndarray]) -> float:
    """Share of the person's pixels whose class changed though the picture did not."""
    grey = [cv2.GaussianBlur(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY), (0, 0), 2).astype(int) for p in pictures]
    still = (np.abs(grey[1] - grey[0]) < UNCHANGED) & ((before != BACKGROUND) | (after != BACKGROUND))
    return float((before != after)[still].mean()) if still.any() else np.nan


def sheet(frames: list[np.ndarray], ours: list[np.ndarray], theirs: list[np.ndarray]) -> np.ndarray:
    rows = []
    for frame, a, b in zip(frames, ours, theirs, strict=True):
        groups = [sum(2**k * np.isin(m, classes) for k, classes in enumerate(REGIONS.values())) for m in (a, b)]
        differs = (frame // 3).astype(np.uint8)
        wrong = groups[0] != groups[1]
        differs[wrong] = (0, 200, 0)
        differs[wrong & (groups[1] == 0)] = (255, 40, 40)
        differs[wrong & (groups[0] == 0)] = (60, 90, 255)
        rows.append(np.concatenate([frame, COLOURS[a], COLOURS[b], differs], 1))
    return np.concatenate(rows)


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--reference", default="bisenetv2")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--sheets", type=Path)
    args = parser.parse_args(argv)
    embedded, reference = choose("mediapipe"), choose(args.reference)
    print(f"| clip | {' | '.join(REGIONS)} | flicker |\n|---|{'---|' * (len(REGIONS) + 1)}")
    rows, every = [], []
    for path in args.folders:
        clip = Clip(DatasetFolder(path))
        # pairs of neighbours, so that flicker can be told
        first = np.array(clip.ids)[np.unique(np.linspace(0, len(clip.ids) - 2, args.frames).astype(int))]
        wanted = sorted({int(i) for i in first} | {int(i) + 1 for i in first if clip.found[min(i + 1, len(clip.found) - 1)]})
        ours, theirs = dict(embedded.run(clip, wanted)), dict(reference.run(clip, [int(i) for i in first]))
        every += (frames := [overlap(ours[i], theirs[i]) for i in theirs])
        scores = np.nanmedian(frames, 0)
        changes = [flicker(ours[i], ours[i + 1], [clip.frame(i), clip.frame(i + 1)]) for i in theirs if i + 1 in ours]
        rows.append([*scores, float(np.nanmean(changes))])
        print(f"| {path.name} | {' | '.join(f'{value:.3f}' for value in rows[-1][:-1])} | {rows[-1][-1]:.2%} |", flush=True)
        if args.sheets:
            some = list(theirs)[:: max(1, len(theirs) // SHOWN)][:SHOWN]
            args.sheets.mkdir(parents=True, exist_ok=True)
            picture = sheet([clip.frame(i) for i in some], [ours[i] for i in some], [theirs[i] for i in some])
            write_rgb(args.sheets / f"{path.name}.jpg", picture)
    print(f"| median of frames | {' | '.join(f'{value:.3f}' for value in np.nanmedian(every, 0))} | |")
    middle = np.nanmedian(rows, 0)
    print(f"| median of clips | {' | '.join(f'{value:.3f}' for value in middle[:-1])} | {middle[-1]:.2%} |")


if __name__ == "__main__":
    main()
