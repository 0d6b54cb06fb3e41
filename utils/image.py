"""Pictures on disk. Arrays are (H, W, 3) uint8 RGB everywhere in memory; any file name works."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.constants import BACKGROUND, CLOTH, NECK_CLASSES
from utils.errors import UserError
from utils.files import write_bytes


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Raises UserError naming the file if it is absent or damaged."""
    return cv2.cvtColor(_decode(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read_rgba(path: Path) -> np.ndarray:
    """(H, W, 4) uint8 RGBA; an opaque alpha is added where the file has none."""
    image = _decode(path, cv2.IMREAD_UNCHANGED)
    if image.ndim == 2:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    if image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA)


def write_rgb(path: Path, image: np.ndarray, quality: int = 95) -> None:
    """Write (H, W, 3) RGB or (H, W, 4) RGBA uint8, atomically; JPEG `quality` 0..100, 4:4:4 chroma (lips are small and red)."""
    path = Path(path)
    code = cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR
    options = {
        ".jpg": [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444],
        # of the filters alone "up" is as small as choosing among all of them, and written and read a third faster
        ".png": [cv2.IMWRITE_PNG_COMPRESSION, 3, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP],
    }[path.suffix]
    ok, data = cv2.imencode(path.suffix, cv2.cvtColor(image, code), options)
    if not ok:
        raise UserError(f"{path}: the image could not be encoded")
    write_bytes(path, data.tobytes())


def over(image: np.ndarray, background: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: an (H, W, 4) RGBA picture over an (H, W, 3) one."""
    result, alpha = background.copy(), cv2.extractChannel(image, 3)
    _, top, _, height = cv2.boundingRect(alpha)
    if height:  # a torso leaves the upper half free, and there is nothing to blend there
        rows = slice(top, top + height)
        weight = alpha[rows].astype(np.float32)
        cv2.blendLinear(cv2.cvtColor(image[rows], cv2.COLOR_RGBA2RGB), background[rows], weight, 255 - weight, result[rows])
    return result


def nearest(known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of (H, W) the nearest of the `known` (bool) ones: its flat index (H, W), 0 if none is known, and how far it is
    (H, W) float32, in pixels, within a few percent."""
    distance, labels = cv2.distanceTransformWithLabels((~known).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    index = np.zeros(labels.max() + 1, np.intp)
    index[labels[known]] = np.flatnonzero(known)
    return index[labels], distance


def _decode(path: Path, flags: int) -> np.ndarray:
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    image = cv2.imdecode(data, flags) if data.size else None
    if image is None:
        raise UserError(f"{path} is damaged or no image; delete it and run the stage that writes it again")
    return image


# The lineage's colour of each class, RGB as an image viewer shows it: head blue, neck green, torso red, background white.
def _parsing_palette() -> bytes:
    colours = np.tile(np.array([0, 0, 255], np.uint8), (256, 1))
    colours[list(NECK_CLASSES)] = (0, 255, 0)
    colours[CLOTH] = (255, 0, 0)
    colours[BACKGROUND] = (255, 255, 255)
    return colours.tobytes()


def write_parsing(path: Path, classes: np.ndarray) -> None:
    """Write (H, W) uint8 CelebAMask classes as a palette PNG: OpenCV reads the lineage's colours, `read_parsing` the classes."""
    image = Image.fromarray(classes, mode="P")
    image.putpalette(_parsing_palette())
    data = io.BytesIO()
    image.save(data, format="PNG", compress_level=3)
    write_bytes(path, data.getvalue())


def read_parsing(path: Path) -> np.ndarray:
    """(H, W) uint8 CelebAMask classes 0..18.

    A three-colour map of the lineage (head, neck, torso, background) is accepted too; its head becomes class 1 (skin).
    """
    try:
        image = Image.open(path)
        if image.mode in ("P", "L"):
            return np.asarray(image)
        rgb = np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run process.py --task 3 again") from None
    red, green, blue = (rgb[..., c] == 255 for c in range(3))
    classes = np.zeros(rgb.shape[:2], np.uint8)
    classes[blue & ~red & ~green] = 1
    classes[green & ~red & ~blue] = NECK_CLASSES[0]
    classes[red & ~green & ~blue] = CLOTH
    return classes
