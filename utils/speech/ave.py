"""Speech features of SyncTalk's Audio-Visual Encoder (Peng et al., CVPR 2024): 512 numbers a frame.

Thirteen convolutions over windows of 16 mel frames (200 ms, five video frames), the layout of Wav2Lip's audio tower (Prajwal et al.
2020). Mel frames come 80 a second; window i begins at mel frame floor(3.2 i), that is at video frame i. Row i of the features is
the window that begins two frames earlier, so it is centred on the middle of frame i; the first and the last window are repeated
where there is none. The network is laid out by the names of the public weights audio_visual_encoder.pth (docs/preprocessing.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import model_store
from utils.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from utils.weights import load_strictly, read_tensors

HOP, WINDOW, BANDS = 200, 800, 80
LOWEST, HIGHEST = 55.0, 7600.0  # Hz
EMPHASIS = 0.97
RATE = SAMPLE_RATE // HOP  # 80 mel frames a second
LENGTH = 16  # mel frames of a window
EARLIER = 2  # video frames that a row's window begins before it
BATCH = 128  # windows at once

# inputs, outputs, kernel, stride (mel, time), padding; equal inputs and outputs of a 3x3 with padding: residual
LAYERS = (
    (1, 32, 3, 1, 1), (32, 32, 3, 1, 1), (32, 32, 3, 1, 1),
    (32, 64, 3, (3, 1), 1), (64, 64, 3, 1, 1), (64, 64, 3, 1, 1),
    (64, 128, 3, 3, 1), (128, 128, 3, 1, 1), (128, 128, 3, 1, 1),
    (128, 256, 3, (3, 2), 1), (256, 256, 3, 1, 1),
    (256, 512, 3, 1, 0), (512, 512, 1, 1, 0),
)  # fmt: skip


class Block(nn.Module):
    """Convolution, batch norm, the input again where shapes allow, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int | tuple[int, int], padding: int):
        super().__init__()
        self.conv_block = nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.BatchNorm2d(outputs))
        self.residual = inputs == outputs and padding == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_block(x)
        return F.relu(y + x if self.residual else y)


def make_network() -> nn.Sequential:
    """(B, 1, 80, 16) mel x time -> (B, 512, 1, 1), none negative."""
    return nn.Sequential(*(Block(*layer) for layer in LAYERS))


def load_network(path: Path) -> nn.Sequential:
    """The encoder with the weights of audio_visual_encoder.pth. Raises UserError if they do not fit exactly."""
    tensors = read_tensors(path, "ave")
    wrappers = ("module", "audio_encoder", "state_dict")
    tensors = {".".join(part for part in name.split(".") if part not in wrappers): value for name, value in tensors.items()}
    with torch.device("meta"):
        network = make_network()
    network.to_empty(device="cpu")
    load_strictly(network, tensors, path, "ave")
    return network.eval().requires_grad_(False)


@functools.cache
def _filters() -> tuple[np.ndarray, np.ndarray]:
    import librosa  # slow to import, and needed only where speech is encoded

    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    bands = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=WINDOW, n_mels=BANDS, fmin=LOWEST, fmax=HIGHEST)
    return window, bands.T.astype(np.float32)


def mel_frames(samples: np.ndarray, start: int, stop: int) -> np.ndarray:
    """(stop - start, 80) float32 mel frames in -4..4 of (S,) samples at 16 kHz; frame m is centred on sample 200 m.

    Pre-emphasis, magnitude of the STFT (Hann, zeros beyond both ends), Slaney mel, decibels -20, then -100..0 dB mapped to -4..4.
    """
    first = start * HOP - WINDOW // 2
    index = np.arange(first - 1, (stop - 1) * HOP + WINDOW // 2)
    piece = np.where((index >= 0) & (index < len(samples)), samples[np.clip(index, 0, len(samples) - 1)], np.float32(0))
    emphasised = np.where(index[1:] < len(samples), piece[1:] - np.float32(EMPHASIS) * piece[:-1], np.float32(0))
    window, bands = _filters()
    frames = np.lib.stride_tricks.sliding_window_view(emphasised.astype(np.float32), WINDOW)[::HOP]
    magnitude = np.abs(np.fft.rfft(frames * window, axis=1)).astype(np.float32)
    decibels = 20 * np.log10(np.maximum(magnitude @ bands, 1e-5)) - 20
    return np.clip(8 * (decibels + 100) / 100 - 4, -4, 4)


def mel_count(samples: int) -> int:
    """Mel frames of a recording; at least one window's."""
    return max(samples // HOP + 1, LENGTH)


def window_count(mel: int) -> int:
    """Windows of `mel` frames: floor((mel - 16) / 80 * 25) + 2; the last ones are moved back to fit."""
    return (mel - LENGTH) * FPS // RATE + 2


class AveEncoder:
    """512 features a video frame, none negative."""

    name, dim, by_user = "ave", LAYERS[-1][1], True

    def available(self) -> bool:
        return model_store.find("ave") is not None

    def prepare(self) -> None:
        _network(str(model_store.fetch("ave")))

    @torch.inference_mode()
    def stream(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        network, frames = _network(str(model_store.fetch("ave"))), -(-len(samples) // SAMPLES_PER_FRAME)
        mel = mel_count(len(samples))
        last = window_count(mel) - 1
        for first in range(0, frames, BATCH):
            rows = np.arange(first, min(first + BATCH, frames))
            windows, place = np.unique(np.clip(rows - EARLIER, 0, last), return_inverse=True)
            begins = np.minimum(windows * RATE // FPS, mel - LENGTH)
            spectrum = mel_frames(samples, int(begins[0]), int(begins[-1]) + LENGTH)
            stacked = np.stack([spectrum[b : b + LENGTH].T for b in begins - begins[0]])
            yield network(torch.from_numpy(stacked)[:, None]).flatten(1).numpy()[place]


@functools.cache
def _network(path: str) -> nn.Sequential:
    return load_network(Path(path))
