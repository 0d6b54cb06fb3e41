"""A labelled grid of frames, to look at a video in one glance.

    python -m utils.contact_sheet VIDEO_OR_FOLDER [--out sheet.png] [--count 16] [--columns 4] [--start 0] [--compare OTHER]

With --compare every tile shows the frame of both, side by side. A folder is read as 0.jpg, 1.png, ... in the order of numbers.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from utils.constants import FPS
from utils.errors import UserError, command_line
from utils.image import read_rgb, write_rgb
from utils.video import read_frames


def label(image: np.ndarray, text: str) -> np.ndarray:
    """A copy of (..., H, W, 3) uint8 with `text` in its upper left corner, white on a dark bar, sized for the picture."""
    image = image.copy()
    for channel in range(3):
        inscribe(image[..., channel], writing(text, image.shape[-3]))
    return image


def inscribe(planes, written) -> None:
    """As `label`, on (..., H, W) uint8 themselves: arrays, or tensors if `written` is one; see `writing`."""
    height, width = planes.shape[-2:]
    written = written[:height, :width]
    bar = planes[..., : written.shape[0], : written.shape[1]]
    bar[:] = (bar // 3).clip(written)


@functools.lru_cache(256)  # a video writes the same words on every frame
def writing(text: str, picture_height: int) -> np.ndarray:
    """(h, w) uint8: `text`, white on a black bar, sized for pictures of that height."""
    scale = max(0.35, picture_height / 512 * 0.7)
    thickness = max(1, round(scale * 1.5))
    (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    bar = np.zeros((height + 2 * base, width + 2 * base), np.uint8)
    return cv2.putText(bar, text, (base, height + base), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness, cv2.LINE_AA)


def grid(tiles: list[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Tiles (H, W, 3) uint8, made as large as the first, row by row; missing ones at the end stay dark."""
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    columns = min(columns, len(tiles))
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 24, np.uint8)
    for k, tile in enumerate(tiles):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        sheet[y : y + height, x : x + width] = fit(tile, width, height)
    return sheet


def fit(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize to width x height; areas are averaged where it shrinks."""
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if image.shape[0] > height else cv2.INTER_LINEAR)


def _numbered(folder: Path) -> list[Path]:
    """Pictures of a folder whose names are numbers, in their order."""
    return sorted((p for p in folder.iterdir() if p.suffix in (".jpg", ".png") and p.stem.isdecimal()), key=lambda p: int(p.stem))


def spread(path: Path, count: int, start: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, (H, W, 3) uint8) of `count` frames spread evenly from frame `start` to the end.

    Raises UserError if there is no frame at or after `start`.
    """
    path = Path(path)
    if path.is_dir():
        files = _numbered(path)[start:]
        wanted = _wanted(len(files), count, path, start)
        yield from ((files[k].stem, read_rgb(files[k])) for k in wanted)
        return
    total = sum(1 for _ in read_frames(path)) - start
    wanted = _wanted(total, count, path, start)
    for k, frame in enumerate(read_frames(path, start=start)):
        if k in wanted:
            yield f"{k + start} ({(k + start) / FPS:.2f} s)", frame


def _wanted(total: int, count: int, path: Path, start: int) -> list[int]:
    if total <= 0:
        raise UserError(f"{path} holds no frame at or after frame {start}; give a video, or a folder of numbered pictures")
    return sorted({round(x) for x in np.linspace(0, total - 1, min(count, total))})


def contact_sheet(path: Path, count: int = 16, columns: int = 4, start: int = 0, compare: Path | None = None,
                  tile: int = 256) -> np.ndarray:  # fmt: skip
    """(H, W, 3) uint8: `count` labelled frames of a video or folder, beside those of `compare` if given; tiles `tile` high."""
    tiles = []
    others = spread(compare, count, start) if compare else None
    for name, frame in spread(path, count, start):
        pair = [frame] + ([next(others, ("", np.zeros_like(frame)))[1]] if others else [])
        pair = [fit(picture, round(tile * frame.shape[1] / frame.shape[0]), tile) for picture in pair]
        tiles.append(label(np.concatenate(pair, axis=1), name))
    return grid(tiles, columns)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="video, or folder of numbered pictures")
    parser.add_argument("--out", type=Path, help="PNG or JPEG to write (default: <name>_sheet.png beside it)")
    parser.add_argument("--count", type=int, default=16, help="frames on the sheet (%(default)s)")
    parser.add_argument("--columns", type=int, default=4, help="tiles in a row (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="first frame (%(default)s)")
    parser.add_argument("--compare", type=Path, help="a second video or folder, shown beside the first")
    args = parser.parse_args()
    if min(args.count, args.columns) < 1 or args.start < 0:
        raise UserError("--count and --columns must be at least 1, --start at least 0")
    out = args.out or args.path.with_name(args.path.stem + "_sheet.png")
    if out.suffix not in (".png", ".jpg"):
        raise UserError(f"--out {out} must end in .png or .jpg")
    write_rgb(out, contact_sheet(args.path, args.count, args.columns, args.start, args.compare))
    print(out)


if __name__ == "__main__":
    main()
