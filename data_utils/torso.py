"""Stage 5, what stands behind the rendered head: gt_imgs (the frame on the plate) and torso_imgs (the body without its head, its
neck continued upward under the chin, so that an opening jaw or a moved head uncovers skin and not the background)."""

from __future__ import annotations

import argparse

import cv2
import numpy as np

from data_utils.per_frame import is_whole, ordered_map
from utils.constants import BACKGROUND, CLOTH, FACE_CLASSES, HEAD_CLASSES, NECK_CLASSES
from utils.dataset_folder import DatasetFolder
from utils.image import nearest, read_parsing, read_rgb, write_rgb
from utils.progress import progress

VERSION = 2  # 2: the body goes on under the head on every side; no outline of the chin stays on the neck
# lengths in pixels of a picture 512 high (lineage.md 1.6)
NECK_LENGTH, MARGIN = 53, 9  # how far the neck is continued up under the head, and the body on every side
PUSH_DOWN = 4  # the rows at the very edge of the chin mix skin and shadow: the colour is taken from below them
EDGE = 3  # the body's mask fades out over this many pixels of background
DARKENING = 0.98  # a pixel
SMOOTHING = (3, 8, 20)  # sigmas of the neck's colours: sharper near the seam, smoother far from it


def run(folder: DatasetFolder, options: argparse.Namespace) -> dict:
    """Write gt_imgs/{i}.jpg and torso_imgs/{i}.png for every parsed frame."""
    plate = read_rgb(folder.require(folder.background))
    ids = sorted(int(p.stem) for p in (folder.root / "parsing").glob("[0-9]*.png") if p.stem.isdecimal())
    if not ids:
        folder.require(folder.parsing(0))
    todo = [i for i in ids if options.force or not (is_whole(folder.gt(i)) and is_whole(folder.torso(i)))]

    def work(i: int) -> bool:
        frame, classes = read_rgb(folder.frame(i)), read_parsing(folder.parsing(i))
        write_rgb(folder.gt(i), on_plate(frame, classes, plate))
        write_rgb(folder.torso(i), torso_image(frame, classes))
        return bool(np.isin(classes, NECK_CLASSES).any())

    with progress(label="torso", total=len(ids), initial=len(ids) - len(todo)) as bar:
        without_neck = 0
        for neck in ordered_map(work, todo):
            without_neck += not neck
            bar.update()
    warnings = []
    if todo and without_neck > 0.5 * len(todo):
        warnings.append(f"no neck is visible in {without_neck} of {len(todo)} frames; a gap may show below an opening jaw")
    return {"frames": len(ids), "written_now": len(todo), "without_neck": without_neck, "warnings": warnings}


def on_plate(frame: np.ndarray, classes: np.ndarray, plate: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: the person of `frame` over the background plate, the edge feathered outward."""
    alpha = _feathered(classes != BACKGROUND)
    image = np.where((alpha == 1)[..., None], frame, plate)
    edge = (alpha > 0) & (alpha < 1)
    image[edge] = _mix(frame[edge], plate[edge], alpha[edge])
    return image


def torso_image(frame: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 RGBA: neck and cloth of `frame`, continued a little under the head, the neck far up; alpha 0 elsewhere.

    frame (H, W, 3) uint8, classes (H, W). Outside the head the visible pixels are the frame's own, but for the neck's first rows.
    """
    head, neck, cloth = np.isin(classes, HEAD_CLASSES), np.isin(classes, NECK_CLASSES), classes == CLOTH
    body, unit = neck | cloth, frame.shape[0] / 512
    colour = frame.copy()
    painted = _paint_around(colour, head, body, max(1, round(MARGIN * unit)))
    painted = np.maximum(painted, _paint_neck(colour, head, np.isin(classes, FACE_CLASSES), neck, cloth, unit))
    alpha = np.where(head, painted, _feathered(body))
    alpha = np.round(alpha * 255).astype(np.uint8)
    colour *= (alpha > 0)[..., None]
    return np.dstack([colour, alpha])


def _feathered(mask: np.ndarray) -> np.ndarray:
    """(H, W) float32: 1 on the mask and one pixel around it, fading to 0 within EDGE more."""
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3)
    return np.clip(1 - (distance - 1) / EDGE, 0, 1)


def _mix(over: np.ndarray, under: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha[..., None].astype(np.float32)
    return np.round(over * weight + under * (1 - weight)).astype(np.uint8)


def _paint_around(colour: np.ndarray, head: np.ndarray, body: np.ndarray, length: int) -> np.ndarray:
    """Continue the body under the head on every side by less than `length` pixels, in place: each pixel takes the colour of the
    nearest one of the body, darker with the distance. The painted mask."""
    index, distance = nearest(body)
    painted = head & (distance < length)
    colour[painted] = (colour.reshape(-1, 3)[index[painted]] * DARKENING ** distance[painted, None]).astype(np.uint8)
    return painted


def _paint_neck(colour: np.ndarray, head: np.ndarray, face: np.ndarray, neck: np.ndarray, cloth: np.ndarray,
                unit: float) -> np.ndarray:  # fmt: skip
    """Continue the neck under the head, in place; (H, W) float32 alpha of what was painted, fading out at its top.

    The rows just below the seam, where chin and neck mix, are painted too: a chin that moves would leave its outline on the neck.
    """
    alpha = np.zeros(head.shape, np.float32)
    length, push = max(2, round(NECK_LENGTH * unit)), max(1, round(PUSH_DOWN * unit))
    columns, seam = _seam(head, face, neck, cloth, round(MARGIN * unit))
    if not seam.size:
        return alpha
    rows = slice(max(0, int(seam.min()) - length), min(head.shape[0], int(seam.max()) + length))
    above = seam[None, :] - np.arange(rows.start, rows.stop)[:, None]  # rows above the seam
    head, neck, patch = head[rows, columns], neck[rows, columns], colour[rows, columns]
    weight = np.where(head & (above > 0), np.clip((length + 1 - above) * (4 / length), 0, 1), 0.0)
    alpha[rows, columns] = weight
    # certain neck: not at its border, where chin, collar and background shine in
    known = cv2.erode(neck.astype(np.uint8), np.ones((3, 3), np.uint8), borderType=cv2.BORDER_REPLICATE) & (above < -push)
    if known.sum() < 0.1 * neck.sum():
        known = neck
    blend = np.where(head, weight > 0, neck * np.clip(1.5 + above / push, 0, 1))
    patch[:] = _mix(_diffuse(patch, known.astype(np.float32), unit), patch, blend)
    return alpha


def _seam(head, face, neck, cloth, margin: int) -> tuple[slice, np.ndarray]:
    """Columns and, for each, the row from which the neck is continued upward: its own edge under the head, where it has one.

    On both sides, where the jaw hides the neck behind a collar, the columns go on (at most a third of the neck's width) above
    what was painted of the collar. Empty if no neck lies under the head.
    """
    top, touching = _edge_under(head, neck)
    x = np.flatnonzero(touching)
    if not x.size:
        return slice(0, 0), np.zeros(0)
    first, last = x[0], x[-1]
    rows = dict(zip(x.tolist(), top[x].tolist(), strict=True))
    cloth_top, beside = _edge_under(head, cloth)
    beside &= face[np.maximum(cloth_top - 1, 0), np.arange(face.shape[1])]
    for start, step in ((first, -1), (last, 1)):
        for column in range(start + step, start + step * ((last - first) // 3 + 1), step):
            if not (0 <= column < face.shape[1] and beside[column]):
                break
            rows[column] = max(cloth_top[column] - margin, 0)
    known = np.array(sorted(rows))
    columns = np.arange(known[0], known[-1] + 1)
    return slice(columns[0], columns[-1] + 1), np.interp(columns, known, [rows[k] for k in known.tolist()])


def _edge_under(head: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each column: the row of the part's topmost pixel, and whether the pixel above it is head."""
    top = part.argmax(0)
    return top, part.any(0) & (top > 0) & head[np.maximum(top - 1, 0), np.arange(head.shape[1])]


def _diffuse(picture: np.ndarray, known: np.ndarray, unit: float) -> np.ndarray:
    """(h, w, 3) float32: everywhere the mean of the known pixels around, over the smallest neighbourhood that holds some.

    Gaussian neighbourhoods of growing size, each weighted a hundred times less than the one before: no streaks, no steps.
    """
    values = np.dstack([picture * known[..., None], known]).astype(np.float32)
    small = cv2.resize(values, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    total = cv2.GaussianBlur(values, (0, 0), SMOOTHING[0] * unit, borderType=cv2.BORDER_REFLECT)
    for k, sigma in enumerate(SMOOTHING[1:], 1):
        coarse = cv2.GaussianBlur(small, (0, 0), sigma * unit / 4, borderType=cv2.BORDER_REFLECT)
        total += cv2.resize(coarse, values.shape[1::-1], interpolation=cv2.INTER_LINEAR) * np.float32(0.01**k)
    total += values.mean((0, 1)) * np.float32(1e-6)
    return total[..., :3] / total[..., 3:]
