"""Speech features of whisper-tiny.en's encoder (Radford et al. 2022), run on the CPU by CTranslate2.

The encoder gives 384 numbers every 20 ms, but nearly half of their variance is where the sound lies in the chunk, not what is said:
the same sound half a chunk later gives features as different as those of another sound. A head trained on that would learn the
clock. So the recording goes through in windows of 4 s, one every 0.4 s, and every row is the mean over the ten windows it lies in,
weighted by a Hann window. Position averages out (moved by any time, a row changes by about 5 % of the features' deviation), there
are no seams, and a row does not depend on how long the recording is. Lip openings are predicted from these as well as from plain
chunks where the chunks of training and test fall alike, and better where they do not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from utils import model_store
from utils.constants import SAMPLES_PER_FRAME
from utils.speech.log_mel import loudness, normalised

_WINDOW, _STEP = 400, 40  # log-mel frames of 10 ms; two of them make a row
_BATCH = 10  # windows at once; a batch ends the rows of 4 s
_ROWS = _WINDOW // 2


@functools.cache
def _model(path: str):
    import ctranslate2  # slow to import, and only needed here

    return ctranslate2.models.Whisper(path, device="cpu", compute_type="float32")


class WhisperEncoder:
    """384 features a video frame, in the scale of the encoder's last layer norm (about zero mean, deviation 0.3 to 5)."""

    name, dim, by_user = "whisper", 384, False

    def available(self) -> bool:
        return model_store.find("whisper_tiny_en") is not None

    def prepare(self) -> None:
        model_store.fetch("whisper_tiny_en")

    def stream(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        frames = -(-len(samples) // SAMPLES_PER_FRAME)
        kept, done = np.zeros((0, self.dim), np.float32), 0
        for rows in self._rows(samples):  # 50 a second, row r centred on r / 50 s
            kept = np.concatenate([kept, rows])
            count = min((len(kept) - 1) // 2, frames - done)
            if count > 0:
                # frame i has its middle on row 2 i + 1; the weights 1 2 1 are the low pass that halving the rate asks for
                yield (kept[: 2 * count : 2] + 2 * kept[1 : 2 * count : 2] + kept[2 : 2 * count + 1 : 2]) / 4
                kept, done = kept[2 * count :], done + count
            if done == frames:
                return

    def _rows(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        """Endless blocks of consecutive rows from time 0 on, each the mean over all windows that see it; silence after the end."""
        import ctranslate2

        model, level = _model(str(model_store.fetch("whisper_tiny_en"))), loudness(samples)
        hann = (np.sin(np.pi * (np.arange(_ROWS) + 0.5) / _ROWS) ** 2).astype(np.float32)[:, None]
        weights = hann * (2 * _STEP / _WINDOW)  # the windows over a row sum to 1
        ready, step = _BATCH * _STEP // 2, _STEP // 2
        first = _STEP - _WINDOW  # log-mel frame where the first window begins
        carried = np.zeros((_ROWS - step, self.dim), np.float32)
        while True:
            mel = normalised(samples, first, first + (_BATCH - 1) * _STEP + _WINDOW, level)
            windows = np.lib.stride_tricks.sliding_window_view(mel, _WINDOW, axis=0)[::_STEP]  # (batch, 80, window)
            encoded = model.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(windows)))
            block = np.zeros((ready + _ROWS - step, self.dim), np.float32)
            block[: len(carried)] += carried
            for k, rows in enumerate(np.asarray(encoded)):
                block[k * step : k * step + _ROWS] += weights * rows
            yield block[max(0, -first // 2) : ready] if first < 0 else block[:ready]
            carried, first = block[ready:], first + _BATCH * _STEP
