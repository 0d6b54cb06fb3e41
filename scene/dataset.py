"""Training batches: decoded in a background thread, uint8, in an order that depends on nothing but seed and iteration."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from scene.condition import Conditions
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.constants import PART_CLASSES
from utils.errors import UserError

PREFETCH = 3  # batches decoded ahead
LIPS, RIGHT_EYE, LEFT_EYE = slice(48, 60), slice(36, 42), slice(42, 48)  # landmarks: outer lips, the two eyes


@dataclasses.dataclass
class Batch:
    """B frames cut to the training window."""

    ids: list[int]
    image: Tensor  # (B, 3, h, w) uint8
    mask: Tensor  # (B, 1, h, w) bool: the part that is modelled
    lips: Tensor  # (B, 1, h, w) bool: a square around the lips
    eyes: Tensor  # (B, 1, h, w) bool: a square around each eye
    conditions: Conditions  # intrinsics are those of the window


@dataclasses.dataclass
class Window:
    """The part of the frame in which anything is modelled: rendering less is training faster."""

    x: int
    y: int
    width: int
    height: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        return image[self.y : self.y + self.height, self.x : self.x + self.width]


class TrainingSet:
    """Frames of one split, with the classes of `part` as the foreground."""

    def __init__(self, reader: TalkingDatasetReader, ids: list[int], part: str, batch_size: int, seed: int):
        self.reader, self.ids, self.batch_size, self.seed = reader, ids, min(batch_size, len(ids)), seed
        self.is_part = np.isin(np.arange(256), PART_CLASSES[part])
        self.window = self._window()

    def _window(self, margin: float = 0.05) -> Window:
        """Bounding box of the part over a sample of frames, with a margin, on multiples of the rasterizer's tile."""
        r = self.reader
        union = np.zeros((r.height, r.width), bool)
        for i in self.ids[:: max(1, len(self.ids) // 100)]:
            union |= self.is_part[r.parsing(i)]
        rows, columns = np.flatnonzero(union.any(1)), np.flatnonzero(union.any(0))
        if len(rows) == 0:
            raise UserError(f"{r.folder.root / 'parsing'} shows no pixel of the part to train; run process.py --task 3 again")
        pad_y, pad_x = int(margin * r.height), int(margin * r.width)
        y0, y1 = max(rows[0] - pad_y, 0) // 16 * 16, min(rows[-1] + pad_y + 1, r.height)
        x0, x1 = max(columns[0] - pad_x, 0) // 16 * 16, min(columns[-1] + pad_x + 1, r.width)
        return Window(int(x0), int(y0), int(min(-(-(x1 - x0) // 16) * 16, r.width - x0)),
                      int(min(-(-(y1 - y0) // 16) * 16, r.height - y0)))  # fmt: skip

    def load(self, ids: list[int]) -> Batch:
        """Decode the frames `ids`."""
        w = self.window
        images, masks = [], []
        lips, eyes = (np.zeros((len(ids), 1, w.height, w.width), bool) for _ in range(2))
        for row, i in enumerate(ids):
            images.append(w.cut(self.reader.image(i)).transpose(2, 0, 1))
            masks.append(self.is_part[w.cut(self.reader.parsing(i))][None])
            landmarks = self.reader.landmarks(i) - (w.x, w.y)
            _mark_square(lips[row, 0], landmarks[LIPS])
            _mark_square(eyes[row, 0], landmarks[RIGHT_EYE])
            _mark_square(eyes[row, 0], landmarks[LEFT_EYE])
        conditions = self.reader.conditions(ids)
        conditions.intrinsics = conditions.intrinsics.clone()
        conditions.intrinsics[:, 0, 2] -= w.x
        conditions.intrinsics[:, 1, 2] -= w.y
        image, mask = torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))
        return Batch(ids, image, mask, torch.from_numpy(lips), torch.from_numpy(eyes), conditions)

    def batch_ids(self, iteration: int) -> list[int]:
        """Frame ids of an iteration (from 0): shuffled epochs laid end to end, a function of seed and iteration alone."""
        first = iteration * self.batch_size
        epochs: dict[int, np.ndarray] = {}
        chosen = []
        for k in range(first, first + self.batch_size):
            epoch, position = divmod(k, len(self.ids))
            if epoch not in epochs:
                epochs[epoch] = np.random.default_rng((self.seed, epoch)).permutation(len(self.ids))
            chosen.append(self.ids[epochs[epoch][position]])
        return chosen

    def batches(self, start: int, end: int) -> Iterator[Batch]:
        """Batches of the iterations start .. end-1, decoded ahead of time."""
        with ThreadPoolExecutor(1) as pool:
            queue = deque(pool.submit(self.load, self.batch_ids(k)) for k in range(start, min(start + PREFETCH, end)))
            for k in range(start, end):
                batch = queue.popleft().result()
                if k + PREFETCH < end:
                    queue.append(pool.submit(self.load, self.batch_ids(k + PREFETCH)))
                yield batch


def _mark_square(mask: np.ndarray, points: np.ndarray) -> None:
    """Set the square around (K, 2) landmarks, a fifth larger than they are wide, in an (H, W) mask."""
    centre, half = points.mean(0), np.ptp(points, 0).max() * 0.6
    low = np.clip(centre - half, 0, None).astype(int)
    high = np.clip(centre + half + 1, 0, None).astype(int)
    mask[low[1] : high[1], low[0] : high[0]] = True
