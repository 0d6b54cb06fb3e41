"""Pictures in the form that videos store: planes Y, Cb, Cr of BT.709, limited range, chroma at half resolution. What is drawn so
VideoWriter need not convert, which takes longer than drawing a map."""

from __future__ import annotations

import cv2
import numpy as np

# RGB of 0 to 255 -> Y, Cb, Cr: (3, 4), the last column added (ITU-R BT.709, sections 3 and 4)
_LUMA = np.array([0.2126, 0.7152, 0.0722])
_LEVELS = np.vstack([219 * _LUMA, 224 * (np.eye(3)[2] - _LUMA) / 1.8556, 224 * (np.eye(3)[0] - _LUMA) / 1.5748]) / 255
BT709 = np.column_stack([_LEVELS, [16, 128, 128]])


class Planes:
    """A black picture of even sides; `buffer` (3 H / 2, W) uint8 holds Y, then Cb, then Cr, as VideoWriter takes them."""

    def __init__(self, width: int, height: int):
        self.buffer = np.full((height * 3 // 2, width), 128, np.uint8)
        self.buffer[:height] = 16
        self._luma, self._chroma = self.buffer[:height], self.buffer[height:].reshape(2, height // 2, width // 2)

    def look_up(self, values: np.ndarray, tables: np.ndarray, x: int = 0, y: int = 0) -> None:
        """Draw (h, w) uint8 values in the colours `tables` (3, 256) uint8 gives them; x, y of the upper left corner; all even."""
        height, width = values.shape
        cv2.LUT(values, tables[0], self._luma[y : y + height, x : x + width])
        quarter = _half(values)
        for table, plane in zip(tables[1:], self._chroma, strict=True):
            cv2.LUT(quarter, table, plane[y // 2 : (y + height) // 2, x // 2 : (x + width) // 2])

    def put(self, image: np.ndarray, x: int = 0, y: int = 0) -> None:
        """Draw an (h, w, 3) RGB uint8 picture; x, y of its upper left corner; all even."""
        height, width = image.shape[:2]
        levels = cv2.split(cv2.transform(image, BT709))
        self._luma[y : y + height, x : x + width] = levels[0]
        for level, plane in zip(levels[1:], self._chroma, strict=True):
            plane[y // 2 : (y + height) // 2, x // 2 : (x + width) // 2] = _half(level)


def _half(plane: np.ndarray) -> np.ndarray:
    return cv2.resize(plane, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
