"""Stage 4, the background plate: bc.jpg, what the camera sees where the person stands, gathered over the clip."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np
from scipy.ndimage import distance_transform_edt

from data_utils.per_frame import ordered_map
from utils.constants import BACKGROUND
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.image import read_parsing, read_rgb, write_rgb
from utils.progress import progress

EVERY, AT_LEAST = 20, 30  # every 20th frame, but at least 30 of a short clip
SAFE_DISTANCE = 5  # px from the person beyond which a pixel is surely background


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """Write bc.jpg from the frames that were parsed."""
    ids = sorted(int(p.stem) for p in (folder.root / "parsing").glob("[0-9]*.png") if p.stem.isdecimal())
    if not ids:
        folder.require(folder.parsing(0))
    step = max(1, min(EVERY, len(ids) // AT_LEAST))
    chosen = ids[::step]
    frames = ordered_map(lambda i: (read_rgb(folder.frame(i)), distance_to_person(read_parsing(folder.parsing(i)))), chosen)
    plate, seen = background_plate(progress(frames, label="background", total=len(chosen)))
    write_rgb(folder.background, plate)
    warnings = []
    if seen < 0.1:
        warnings.append(f"only {seen:.0%} of the background was ever seen; the rest of the plate is guessed from it")
    return {"frames": len(chosen), "seen": seen, "warnings": warnings}


def distance_to_person(classes: np.ndarray) -> np.ndarray:
    """(H, W) float32 pixels to the nearest pixel of the person, 0 on it; infinite if nobody is in the frame."""
    background = classes == BACKGROUND
    if background.all():
        return np.full(classes.shape, np.inf, np.float32)
    return distance_transform_edt(background).astype(np.float32)


def background_plate(frames: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, float]:
    """Plate (H, W, 3) uint8, and the share of it that was really seen.

    `frames` yields (picture (H, W, 3) uint8, distance to the person (H, W)). Each pixel is taken from the frame in which it lies
    farthest from the person; pixels never farther than SAFE_DISTANCE take the colour of the nearest one that was.
    Lineage: AD-NeRF's background step; the Euclidean distance transform gives its nearest-neighbour search exactly.
    Raises UserError if no pixel was ever safe.
    """
    farthest = plate = None
    for picture, distance in frames:
        if farthest is None:
            farthest, plate = distance.copy(), picture.copy()
            continue
        if picture.shape != plate.shape:
            raise UserError(f"the frames differ in size ({picture.shape[1]}x{picture.shape[0]} and "
                            f"{plate.shape[1]}x{plate.shape[0]}); run process.py --task 2 --force again")  # fmt: skip
        better = distance > farthest
        farthest[better] = distance[better]
        plate[better] = picture[better]
    unsafe = farthest <= SAFE_DISTANCE
    if unsafe.all():
        raise UserError("no background is visible in any frame (the person fills the picture); "
                        "record with some room around the head, or use a larger --scale")  # fmt: skip
    rows, columns = distance_transform_edt(unsafe, return_distances=False, return_indices=True)
    return plate[rows, columns], float(1 - unsafe.mean())
