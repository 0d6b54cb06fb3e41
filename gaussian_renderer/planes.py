"""Pictures in the form that videos store: planes Y, Cb, Cr of BT.709, limited range, chroma at half resolution. What is drawn so
VideoWriter need not convert, which takes longer than drawing a map. A whole batch is drawn at once: threads that ask for Python's
lock for every frame and step wait for each other more than they draw.
"""

from __future__ import annotations

import cv2
import numpy as np

# RGB of 0 to 255 -> Y, Cb, Cr: (3, 4), the last column added (ITU-R BT.709, sections 3 and 4)
_LUMA = np.array([0.2126, 0.7152, 0.0722])
_LEVELS = np.vstack([219 * _LUMA, 224 * (np.eye(3)[2] - _LUMA) / 1.8556, 224 * (np.eye(3)[0] - _LUMA) / 1.5748]) / 255
BT709 = np.column_stack([_LEVELS, [16, 128, 128]])


class Planes:
    """`count` black pictures of even sides; `buffer` (count, 3 H / 2, W) uint8 holds Y, then Cb, then Cr of each, as VideoWriter
    takes them."""

    def __init__(self, count: int, width: int, height: int):
        self.buffer = np.full((count, height * 3 // 2, width), 128, np.uint8)
        self.buffer[:, :height] = 16
        self._luma = self.buffer[:, :height]
        self._chroma = self.buffer[:, height:].reshape(count, 2, height // 2, width // 2)

    def look_up(self, values: np.ndarray, tables: np.ndarray, x: int = 0, y: int = 0) -> None:
        """Draw (count, h, w) uint8 values in the colours `tables` (3, 256) uint8 gives them; x, y of the upper left corner; all
        even."""
        count, height, width = values.shape
        rows = values.reshape(-1, width)
        self._put(0, cv2.LUT(rows, tables[0]), x, y, height)
        half = _half(rows)
        for k in (1, 2):
            self._put(k, cv2.LUT(half, tables[k]), x, y, height)

    def put(self, images: np.ndarray, x: int = 0, y: int = 0) -> None:
        """Draw (count, h, w, 3) RGB uint8 pictures, or one of them on all; x, y of their upper left corner; all even."""
        height, width = images.shape[1:3]
        levels = cv2.split(cv2.transform(images.reshape(-1, width, 3), BT709))
        for k, level in enumerate(levels):
            self._put(k, _half(level) if k else level, x, y, height)

    def _put(self, k: int, rows: np.ndarray, x: int, y: int, height: int) -> None:
        """Plane k of pictures that lie one below the other."""
        plane, step = (self._chroma[:, k - 1], 2) if k else (self._luma, 1)
        height, width = height // step, rows.shape[1]
        plane[:, y // step : y // step + height, x // step : x // step + width] = rows.reshape(-1, height, width)


def _half(rows: np.ndarray) -> np.ndarray:
    return cv2.resize(rows, (rows.shape[1] // 2, rows.shape[0] // 2), interpolation=cv2.INTER_AREA)
