"""Waveform -> one feature row a frame, for data sets (data_utils/audio.py) and for any speech to be rendered alike.

An encoder is an object with

    name         written in the data set's file names (aud_<name>.npy) and in the model
    dim          width D of a row
    available()  True if its weights are on this machine
    stream(s)    (S,) float32 samples at 16 kHz -> blocks (n, D) float32 of consecutive rows, ceil(S / 640) in all; row i describes
                 the sound centred on the middle of frame i, (i + 1/2) / 25 s

    by_user      True if only the user can get the weights: it is used where they are present, and not missed where they are absent

A further encoder (hubert, deepspeech) is one module with such an object and its line in ENCODERS, best first.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from utils.audio import Recording
from utils.errors import UserError
from utils.progress import progress
from utils.speech.ave import AveEncoder
from utils.speech.mel import MelEncoder
from utils.speech.whisper import WhisperEncoder


class Encoder(Protocol):
    name: str
    dim: int
    by_user: bool

    def available(self) -> bool: ...

    def prepare(self) -> None:
        """Get the weights, downloading them if need be; UserError with the remedy if they cannot be had."""

    def stream(self, samples: np.ndarray) -> Iterator[np.ndarray]: ...


ENCODERS: dict[str, Encoder] = {encoder.name: encoder for encoder in (AveEncoder(), WhisperEncoder(), MelEncoder())}


def best_encoder() -> str:
    """Name of the best encoder that works here; says on stderr why a better one does not (no weights and no network)."""
    for name, encoder in ENCODERS.items():
        if encoder.by_user and not encoder.available():
            continue
        try:
            encoder.prepare()
            return name
        except UserError as error:
            print(f"warning: speech encoder {name} cannot be used: {error}", file=sys.stderr)
    raise UserError("no speech encoder works here; run python -m utils.doctor")


def stream(name: str, samples: np.ndarray | Recording, frames: int) -> Iterator[np.ndarray]:
    """Features of samples at 16 kHz in blocks (n, D) float32 of consecutive rows: cut, or filled with the last, to `frames` rows.

    `samples` is (S,) float32, or a utils.audio.Recording: then memory does not grow with the length. Raises UserError for an
    unknown encoder, absent weights, or no samples at all.
    """
    if name not in ENCODERS:
        raise UserError(f"speech encoder {name} is not known; there are {', '.join(ENCODERS)}")
    if len(samples) == 0:
        raise UserError("the audio holds no samples; give a recording with sound in it")
    encoder = ENCODERS[name]
    encoder.prepare()
    return _exactly(frames, encoder.stream(samples), encoder.dim)


def _exactly(frames: int, blocks: Iterator[np.ndarray], dim: int) -> Iterator[np.ndarray]:
    done, last = 0, np.zeros((1, dim), np.float32)
    while done < frames:
        block = next(blocks, None)
        block = last.repeat(min(frames - done, 1000), 0) if block is None else block[: frames - done]
        if len(block):
            yield block
            done, last = done + len(block), block[-1:]


def encode(name: str, samples: np.ndarray, frames: int, label: str = "") -> np.ndarray:
    """All of `stream` in one array, (frames, D) float32. `label` shows progress under that name. Errors as `stream`."""
    if frames < 1 and name in ENCODERS:
        return np.zeros((0, ENCODERS[name].dim), np.float32)
    features, filled = None, 0
    with progress(label=label, total=frames) if label else contextlib.nullcontext() as bar:
        for block in stream(name, samples, frames):
            features = np.zeros((frames, block.shape[1]), np.float32) if features is None else features
            features[filled : filled + len(block)] = block
            filled += len(block)
            if bar is not None:
                bar.update(len(block))
    return features
