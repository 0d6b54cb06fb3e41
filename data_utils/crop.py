"""The one square window of the source video that becomes the data set's frames."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

# The window around the face mesh (forehead to chin), in face heights: hair above, neck and shoulders below, hair and ears beside.
ABOVE, BELOW, BESIDE = 0.45, 0.60, 0.60
WHOLE_FRAME = 0.75  # a square clip whose wanted window is at least this much of it is only resized


@dataclasses.dataclass(frozen=True)
class Crop:
    """crop.json: source pixel = (x, y) + side / size * data set pixel, with pixel edges as the unit (centres at +0.5)."""

    source_width: int
    source_height: int
    x: int
    y: int
    side: int
    size: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        """(side, side, 3) view of an (H, W, 3) source picture."""
        return image[self.y : self.y + self.side, self.x : self.x + self.side]

    def resize(self, cut: np.ndarray) -> np.ndarray:
        """(size, size, 3) data set frame of what `cut` gave."""
        if self.side == self.size:
            return np.ascontiguousarray(cut)
        method = cv2.INTER_AREA if self.side > self.size else cv2.INTER_CUBIC
        return cv2.resize(cut, (self.size, self.size), interpolation=method)


def head_window(boxes: np.ndarray, width: int, height: int, size: int, scale: float = 1.0) -> Crop:
    """The static window around a head seen at (K, 4) face boxes x0, y0, x1, y1 in a width x height video.

    It holds the head at all its positions but the rarest (5 %), `scale` times enlarged, moved rather than shrunk where it would
    leave the picture, and no larger than the picture. A clip already `size` x `size` is left alone; another square clip is only
    resized unless the head is small in it.
    """
    whole = Crop(width, height, 0, 0, width, size)
    if width == height == size:
        return whole
    face = np.median(boxes[:, 3] - boxes[:, 1])
    left, top = np.percentile(boxes[:, :2], 5, axis=0) - face * np.array([BESIDE, ABOVE])
    right, bottom = np.percentile(boxes[:, 2:], 95, axis=0) + face * np.array([BESIDE, BELOW])
    wanted = scale * max(right - left, bottom - top)
    if width == height and wanted >= WHOLE_FRAME * width:
        return whole
    side = int(min(round(wanted / 2) * 2, width, height))
    x = int(np.clip(round((left + right - side) / 2), 0, width - side))
    y = int(np.clip(round((top + bottom - side) / 2), 0, height - side))
    return Crop(width, height, x, y, side, size)
