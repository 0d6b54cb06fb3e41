"""Do lips and sound belong together in time? The lag at which the sound foretells the opening of the lips best.

A ridge regression from the log-mel spectrum of one row to the lip opening of a frame is fitted on part of the clip and tried on
the rest, for every lag in reach; so a lag cannot win by being fitted better. An offset is where the sound has to begin against
the first picture, in frames of 1/25 s, as in utils.video.VideoInfo.audio_offset: -2 says that sound played from the first picture
on comes two frames late, so that row i + 2 of the features describes frame i.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.ndimage import gaussian_filter1d

from utils import speech
from utils.constants import FPS, SAMPLES_PER_FRAME

REACH = 8  # frames either way
ENOUGH = 10 * FPS  # frames with a face below which nothing is concluded
CORRELATION, STABILITY = 0.35, 0.9  # what a sure estimate has at least; sound of another moment reaches 0.26 on 10 s
TOLERANCE = 1  # frames: lips are ahead of their sound by up to one by nature, and nobody sees it

_FOLDS, _GAP = 8, 12  # held-out parts of the clip, and frames left out beside them
_RIDGE = 0.03  # of a feature's variance
_SLOW = FPS  # frames, deviation of the Gaussian whose mean is taken off the lip opening: speech is faster
_BLOCK, _DRAWS = 2 * FPS, 500  # of the bootstrap


@dataclasses.dataclass
class Estimate:
    """offset: frames beyond what the sound already stands at; correlation: held out, at that offset; stability: share of bootstrap
    draws that agree within a frame; curve: correlation by offset, -8 to 8."""

    offset: int
    correlation: float
    stability: float
    curve: list[float]

    @property
    def sure(self) -> bool:
        return self.correlation >= CORRELATION and self.stability >= STABILITY


def estimate(samples: np.ndarray, opening: np.ndarray) -> Estimate | None:
    """Offset of sound (S,) float32 at 16 kHz, placed as the data set has it, from lip openings (F,), NaN where there is no face.

    None if the clip shows a face for less than 10 s together with sound, or lips or sound never change.
    """
    count = min(len(opening), len(samples) // SAMPLES_PER_FRAME)
    opening = opening[:count].astype(np.float64)
    seen = np.isfinite(opening)
    if seen.sum() < ENOUGH:
        return None
    rows = speech.encode("mel", samples, count).astype(np.float64)
    opening = np.interp(np.arange(count), np.flatnonzero(seen), opening[seen])
    opening -= gaussian_filter1d(opening, _SLOW)
    deviation = rows.std(0)
    if opening.std() < 1e-6 or deviation.max() < 1e-6:
        return None
    rows = (rows - rows.mean(0)) / (deviation + 0.05 * deviation.max())
    frames = np.arange(REACH, count - REACH)
    frames = frames[seen[frames]]
    lags = range(REACH, -REACH - 1, -1)  # row = frame + lag, so ascending offsets
    predicted = np.stack([_held_out(rows[frames + lag], opening[frames], frames) for lag in lags])
    sums = _block_sums(predicted, opening[frames], frames)
    curve = _correlation(sums.sum(2))
    best = int(curve.argmax())
    draws = np.random.default_rng(0).multinomial(sums.shape[2], np.full(sums.shape[2], 1 / sums.shape[2]), _DRAWS)
    drawn = _correlation(np.einsum("skb,db->skd", sums, draws)).argmax(0)
    stability = float((np.abs(drawn - best) <= 1).mean())
    return Estimate(best - REACH, round(float(curve[best]), 3), round(stability, 3), curve.round(3).tolist())


def _held_out(x: np.ndarray, y: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Prediction of y (N,) from x (N, D), of each eighth of the clip by a regression on the rest of it."""
    result = np.zeros(len(y))
    for part in np.array_split(np.arange(len(y)), _FOLDS):
        others = (frames < frames[part[0]] - _GAP) | (frames > frames[part[-1]] + _GAP)
        mean, level = x[others].mean(0), y[others].mean()
        centred = x[others] - mean
        normal = centred.T @ centred + _RIDGE * len(centred) * np.eye(x.shape[1])
        result[part] = (x[part] - mean) @ np.linalg.solve(normal, centred.T @ (y[others] - level)) + level
    return result


def _block_sums(predicted: np.ndarray, true: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(6, K, blocks) sums over blocks of 2 s of 1, p, p^2, y, y^2, p y, for predictions (K, N) of y (N,)."""
    block = (frames - frames[0]) // _BLOCK
    _, block = np.unique(block, return_inverse=True)
    same = np.ones_like(predicted)
    terms = np.stack([same, predicted, predicted**2, same * true, same * true**2, predicted * true])
    return np.stack([terms[..., block == b].sum(-1) for b in range(block.max() + 1)], -1)


def _correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson correlations (...) from sums (6, ...) as _block_sums has them."""
    n, p, pp, y, yy, py = sums
    return (py - p * y / n) / np.sqrt(np.maximum((pp - p * p / n) * (yy - y * y / n), 1e-12))
