"""Encoder without any weights: the log-mel spectrum of each frame."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from utils.constants import SAMPLES_PER_FRAME
from utils.speech.log_mel import BANDS, HOP, loudness, normalised

_PER_FRAME = SAMPLES_PER_FRAME // HOP  # 4 spectra of 10 ms a video frame
_WEIGHTS = np.array([1, 2, 2, 2, 1], np.float32) / 8  # spectra 4 i .. 4 i + 4: symmetric about the middle of frame i
_BLOCK = 1000  # video frames at once


class MelEncoder:
    """80 mel bands of a video frame: the weighted mean of the five 10 ms spectra in it, in Whisper's scale (about -0.6..1.5)."""

    name, dim, by_user = "mel", BANDS, False

    def available(self) -> bool:
        return True

    def prepare(self) -> None:
        pass

    def stream(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        level, frames = loudness(samples), -(-len(samples) // SAMPLES_PER_FRAME)
        for first in range(0, frames, _BLOCK):
            count = min(_BLOCK, frames - first)
            mel = normalised(samples, first * _PER_FRAME, (first + count) * _PER_FRAME + 1, level)
            yield sum(w * mel[k : k + count * _PER_FRAME : _PER_FRAME] for k, w in enumerate(_WEIGHTS))
