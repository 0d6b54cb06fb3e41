"""Waveform -> one feature row a frame, for data sets (data_utils/audio.py) and for any speech to be rendered alike.

An encoder is an object with

    name         written in the data set's file names (aud_<name>.npy) and in the model
    dim          width D of a row
    available()  True if its weights are on this machine
    stream(s)    (S,) float32 samples at 16 kHz -> blocks (n, D) float32 of consecutive rows, ceil(S / 640) in all; row i describes
                 the sound centred on the middle of frame i, (i + 1/2) / 25 s

A further encoder (ave, hubert, deepspeech) is one module with such an object and its line in ENCODERS, best first.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from utils.errors import UserError
from utils.progress import progress
from utils.speech.mel import MelEncoder
from utils.speech.whisper import WhisperEncoder


class Encoder(Protocol):
    name: str
    dim: int

    def available(self) -> bool: ...

    def prepare(self) -> None:
        """Get the weights, downloading them if need be; UserError with the remedy if they cannot be had."""

    def stream(self, samples: np.ndarray) -> Iterator[np.ndarray]: ...


ENCODERS: dict[str, Encoder] = {encoder.name: encoder for encoder in (WhisperEncoder(), MelEncoder())}


def best_encoder() -> str:
    """Name of the best encoder that works here; says on stderr why a better one does not (no weights and no network)."""
    for name, encoder in ENCODERS.items():
        try:
            encoder.prepare()
            return name
        except UserError as error:
            print(f"warning: speech encoder {name} cannot be used: {error}", file=sys.stderr)
    raise UserError("no speech encoder works here; run python -m utils.doctor")


def encode(name: str, samples: np.ndarray, frames: int, label: str = "") -> np.ndarray:
    """Features (frames, D) float32 of (S,) float32 samples at 16 kHz: cut, or filled with the last row, to exactly `frames` rows.

    Works on any length in memory that grows only with the result. `label` shows progress under that name. Raises UserError for an
    unknown encoder, absent weights, or no samples at all.
    """
    if name not in ENCODERS:
        raise UserError(f"speech encoder {name} is not known; there are {', '.join(ENCODERS)}")
    if frames < 1:
        return np.zeros((0, ENCODERS[name].dim), np.float32)
    if len(samples) == 0:
        raise UserError("the audio holds no samples; give a recording with sound in it")
    encoder = ENCODERS[name]
    encoder.prepare()
    features = np.zeros((frames, encoder.dim), np.float32)
    filled = 0
    with progress(label=label, total=frames) if label else contextlib.nullcontext() as bar:
        for block in encoder.stream(samples):
            block = block[: frames - filled]
            features[filled : filled + len(block)] = block
            filled += len(block)
            if bar is not None:
                bar.update(len(block))
            if filled == frames:
                break
    features[filled:] = features[max(filled - 1, 0)]
    return features
