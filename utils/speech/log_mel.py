"""Whisper's log-mel spectrogram, computed piece by piece, and one loudness for the whole recording.

Frame m is centred on sample 160 m: a Hann window of 400 samples, power spectrum, 80 Slaney mel bands (0 to 8 kHz), log10, floor
1e-10 (Radford et al. 2022; n_fft, hop and bands as in their release). Whisper then clamps to 8 decades below the maximum of its
30 s and maps x to (x + 4) / 4. A maximum over a chunk would change the features of a frame with the chunk it falls in, so the
maximum is replaced by the loudness of the whole recording (`loudness`), moved to where speech usually has it: the features depend
neither on the chunk nor on how loud the recording is.
"""

from __future__ import annotations

import functools

import numpy as np

from utils.constants import SAMPLE_RATE

HOP, WINDOW, BANDS = 160, 400, 80
FLOOR = -10.0  # log10 of no sound
LOUD = 1.5  # where `loudness` lands: the level of clearly recorded speech (0.5 to 1.9 over 7 clips)
QUIETEST = LOUD - 4.0  # louder by 40 dB at most, so that a silent room is not taken for speech
RANGE = 8.0  # decades kept below LOUD
_BLOCK = 3000  # frames at once: half a minute


@functools.cache
def _filters() -> tuple[np.ndarray, np.ndarray]:
    import librosa  # slow to import, and needed only where speech is encoded

    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    return window, librosa.filters.mel(sr=SAMPLE_RATE, n_fft=WINDOW, n_mels=BANDS).T.astype(np.float32)


def log_mel(samples: np.ndarray, start: int, stop: int) -> np.ndarray:
    """(stop - start, 80) float32 log10 mel power of frames start..stop-1 of (S,) samples; silence outside the recording."""
    result = np.full((stop - start, BANDS), FLOOR, np.float32)
    first, last = max(start, 0), min(stop, (len(samples) + WINDOW // 2 - 1) // HOP + 1)
    if last <= first:
        return result
    index = np.abs(np.arange(first * HOP - WINDOW // 2, (last - 1) * HOP + WINDOW // 2))  # reflected at the beginning
    piece = np.where(index < len(samples), samples[np.minimum(index, len(samples) - 1)], np.float32(0))
    window, bands = _filters()
    frames = np.lib.stride_tricks.sliding_window_view(piece.astype(np.float32, copy=False), WINDOW)[::HOP]
    power = np.square(np.abs(np.fft.rfft(frames * window, axis=1))).astype(np.float32)
    result[first - start : last - start] = np.log10(np.maximum(power @ bands, 10.0**FLOOR))
    return result


def frame_count(samples: np.ndarray) -> int:
    """10 ms frames whose centre lies in the recording (at least one)."""
    return max(1, len(samples) // HOP)


def loudness(samples: np.ndarray) -> float:
    """The level (log10 mel power of a frame's strongest band) that the loudest hundredth of the recording exceeds."""
    count = frame_count(samples)
    peaks = [log_mel(samples, a, min(a + _BLOCK, count)).max(1) for a in range(0, count, _BLOCK)]
    return float(np.percentile(np.concatenate(peaks), 99))


def normalised(samples: np.ndarray, start: int, stop: int, level: float) -> np.ndarray:
    """Frames start..stop-1 as Whisper wants them, (stop - start, 80) float32 in about -0.6..1.5, for the recording's `loudness`."""
    x = log_mel(samples, start, stop) + np.float32(LOUD - max(level, QUIETEST))
    return (np.maximum(x, np.float32(LOUD - RANGE)) + 4) / 4
