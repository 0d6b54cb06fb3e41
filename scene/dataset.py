"""The frames a head learns from, as bytes on the device that trains; where they do not fit they are decoded ahead of time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch import Tensor

from scene.condition import Conditions
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.constants import PART_CLASSES
from utils.errors import UserError
from utils.image_metrics import eye_opening, lip_opening
from utils.pipeline import prefetch
from utils.progress import progress

LIPS, RIGHT_EYE, LEFT_EYE = slice(48, 60), slice(36, 42), slice(42, 48)  # landmarks: outer lips, the two eyes
THREADS = min(16, os.cpu_count() or 2)  # that decode pictures
SHUT = 0.6  # of the usual opening: below it an eye is shut
PART = 128  # bit of the class byte that says: this pixel is modelled


@dataclasses.dataclass
class Batch:
    """B frames cut to the training window."""

    rows: Tensor  # (B,) of the training set
    image: Tensor  # (B, 3, h, w) uint8
    classes: Tensor  # (B, 1, h, w) uint8 CelebAMask classes
    mask: Tensor  # (B, 1, h, w) bool: the part that is modelled
    lips: Tensor  # (B, 1, 4) square around the lips: left, top, right, bottom in pixels, right and bottom outside; empty if unseen
    eyes: Tensor  # (B, 2, 4) squares around the eyes
    shut: Tensor  # (B,) bool: the eyes are shut
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
    """Frames of one split, with the classes of `part` as the foreground.

    Boxes and driving signals lie on `device`. So do the pictures after `hold`; without it, `fed` brings those of one batch at
    a time. `batch` is the same either way, and waits for nothing.
    """

    def __init__(self, reader: TalkingDatasetReader, ids: list[int], part: str, device: torch.device | str = "cpu",
                 window: Window | None = None):  # fmt: skip
        self.reader, self.ids, self.device = reader, ids, torch.device(device)
        self.is_part = np.isin(np.arange(256), PART_CLASSES[part])
        self._marked = (np.arange(256) + PART * self.is_part).astype(np.uint8)  # class -> class and PART
        self.window = w = window or self._window()
        self.pixels: Tensor | None = None  # (F, 4, h, w) uint8: RGB and class, all frames
        self._batch: Tensor | None = None  # (B, 4, h, w) uint8: the frames at hand
        landmarks = np.stack([reader.landmarks(i) - (w.x, w.y) for i in ids])
        self.mouth, opening = mouth_activity(landmarks), eye_opening(landmarks)
        self.shut = torch.from_numpy(opening < SHUT * np.median(opening)).to(self.device)
        self.lips = torch.tensor([[_square(p[LIPS], w)] for p in landmarks], device=self.device)
        self.eyes = torch.tensor([[_square(p[RIGHT_EYE], w), _square(p[LEFT_EYE], w)] for p in landmarks], device=self.device)
        self.conditions = reader.conditions(ids).to(self.device)
        self.conditions.intrinsics = self.conditions.intrinsics - torch.tensor(
            [[0.0, 0.0, w.x], [0.0, 0.0, w.y], [0.0, 0.0, 0.0]], device=self.device
        )

    def __len__(self) -> int:
        return len(self.ids)

    def weights(self, lip_sampling: float, blink_share: float) -> np.ndarray:
        """(F,) how often each frame is drawn: by its mouth, and so that shut eyes are at least `blink_share` of what is seen."""
        weights = 1 + lip_sampling * self.mouth
        shut = self.shut.cpu().numpy()
        blinks, rest = weights[shut].sum(), weights[~shut].sum()
        if 0 < blinks < blink_share * (blinks + rest):
            weights[shut] *= blink_share * rest / ((1 - blink_share) * blinks)
        return weights

    @property
    def bytes(self) -> int:
        """Memory that `hold` takes."""
        return 4 * self.window.width * self.window.height * len(self)

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

    def decode(self, row: int) -> np.ndarray:
        """(h, w, 4) uint8 of one frame: RGB and class, the bit PART set where it is modelled."""
        i, cut = self.ids[row], self.window.cut
        classes = cv2.LUT(np.ascontiguousarray(cut(self.reader.parsing(i))), self._marked)
        return cv2.merge([*cv2.split(cut(self.reader.image(i))), classes])

    def hold(self) -> TrainingSet:
        """Read every picture once, on all cores, and keep them on the device."""
        w = self.window
        self.pixels = torch.empty(len(self), 4, w.height, w.width, dtype=torch.uint8, device=self.device)
        decoded = prefetch(self.decode, range(len(self)), THREADS, ahead=4 * THREADS)
        for row, frame in enumerate(progress(decoded, label="reading frames", total=len(self)) if len(self) > 64 else decoded):
            self.pixels[row] = torch.from_numpy(frame).to(self.device).permute(2, 0, 1)
        return self

    def fed(self, order: Tensor, first: int, start: int, end: int) -> Iterator[int]:
        """Yield the iterations start .. end-1, each when `batch` has its frames; row k - first of `order` (n, B) names them."""
        if self.pixels is not None:
            yield from range(start, end)
            return
        w, rows = self.window, order.tolist()
        self._batch = torch.empty(order.shape[1], 4, w.height, w.width, dtype=torch.uint8, device=self.device)

        def decode(k: int) -> Tensor:
            frames = torch.from_numpy(np.stack([self.decode(row) for row in rows[k - first]]))
            return frames.pin_memory() if self.device.type == "cuda" else frames

        for k, frames in zip(range(start, end), prefetch(decode, range(start, end), THREADS, ahead=THREADS + 2), strict=True):
            self._batch.copy_(frames.to(self.device, non_blocking=True).permute(0, 3, 1, 2))
            yield k

    def batch(self, rows: Tensor) -> Batch:
        """The frames `rows` (B,), a tensor on the device."""
        pixels = self._batch if self.pixels is None else self.pixels.index_select(0, rows)
        last = pixels[:, 3:]
        conditions = self.conditions.map(lambda x: x.index_select(0, rows))
        lips, eyes, shut = (x.index_select(0, rows) for x in (self.lips, self.eyes, self.shut))
        return Batch(rows, pixels[:, :3], last & (PART - 1), last >= PART, lips, eyes, shut, conditions)


def mouth_activity(landmarks: np.ndarray) -> np.ndarray:
    """(F,) from 0 to 1: how wide the mouth of (F, 68, 2) landmarks is open and how fast it moves, half and half."""
    gap = lip_opening(landmarks)
    speed = np.abs(np.gradient(gap)) if len(gap) > 1 else np.zeros_like(gap)
    return sum(np.clip(x / max(np.percentile(x, 95), 1e-6), 0, 1) for x in (gap, speed)) / 2


def frame_order(weights: np.ndarray, batch_size: int, first: int, end: int, seed: int) -> Tensor:
    """(end - first, B) rows of the frames drawn in each iteration: shuffled epochs laid end to end, a function of the seed.

    An epoch has as many draws as there are `weights` (F,), shared out by them: equal weights give every frame once.
    """
    frames, shares = len(weights), np.cumsum(weights) / np.sum(weights) * len(weights)
    begin, stop = first * batch_size, end * batch_size
    epochs = range(begin // frames, -(-stop // frames))
    draws = [np.zeros(0, int)]
    for epoch in epochs:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(frames)
        draws.append(np.searchsorted(shares, np.arange(frames) + rng.random(), "right").clip(max=frames - 1)[order])
    rows = np.concatenate(draws)
    offset = begin - epochs.start * frames
    return torch.from_numpy(rows[offset : offset + stop - begin].reshape(-1, batch_size))


def _square(points: np.ndarray, window: Window) -> list[int]:
    """Left, top, right, bottom of the square around (K, 2) landmarks, a fifth larger than they are wide, within the window."""
    centre, half = points.mean(0), np.ptp(points, 0).max() * 0.6
    most = (window.width, window.height)
    low, high = (np.clip(corner, 0, most).astype(int) for corner in (centre - half, centre + half + 1))
    return [*low.tolist(), *high.tolist()]
