"""SyncNet, how well lips and sound fit: LSE-D and LSE-C (Chung and Zisserman, "Out of time: automated lip sync in the wild", 2016).

Two towers map five frames of a face (224 pixels, BGR, 0 to 255) and the 0.2 s of sound that belong to them (13 MFCCs, 100 a
second) to 1024 numbers each. Their distance, averaged over the clip, is taken at 31 shifts of the sound: LSE-D is the least of
them (lower is better), LSE-C the median less the least (higher is better): Prajwal et al. 2020. The network is laid out by the
names and shapes in the public weights syncnet_v2.model. The published evaluation crops the face by the box of another detector
(S3FD), so a score means something beside the filmed frames' own, taken in the same way, and not beside a paper's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import model_store
from utils.constants import SAMPLE_RATE
from utils.errors import UserError
from utils.weights import load_strictly, read_tensors

FRAMES, SIDE = 5, 224  # of a window; of its pictures
COEFFICIENTS, FILTERS, HOP, WINDOW, TRANSFORM = 13, 26, 160, 400, 512  # MFCCs of 25 ms, 100 a second
PER_FRAME = 4  # MFCC rows a frame; a window holds 20
EMPHASIS, LIFTER = 0.97, 22
REACH = 15  # frames by which the sound is shifted, both ways
MARGIN = 0.4  # of the face box around it
GREY = 110  # beyond the picture
BATCH = 32  # windows at once

# outputs, kernel, stride, padding of a convolution; kernel, stride, padding of a pool
AUDIO_LAYERS = (
    (64, 3, 1, 1), (1, 1, 0), (192, 3, 1, 1), (3, (1, 2), 0), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), (3, 2, 0),
    (512, (5, 4), 1, 0),
)  # fmt: skip
LIP_LAYERS = (
    (96, (5, 7, 7), (1, 2, 2), 0), ((1, 3, 3), (1, 2, 2), 0), (256, (1, 5, 5), (1, 2, 2), (0, 1, 1)),
    ((1, 3, 3), (1, 2, 2), (0, 1, 1)), (256, (1, 3, 3), 1, (0, 1, 1)), (256, (1, 3, 3), 1, (0, 1, 1)),
    (256, (1, 3, 3), 1, (0, 1, 1)), ((1, 3, 3), (1, 2, 2), 0), (512, (1, 6, 6), 1, 0),
)  # fmt: skip


def _tower(inputs: int, layers: tuple, convolution: type, norm: type, pool: type) -> nn.Sequential:
    modules: list[nn.Module] = []
    for layer in layers:
        if len(layer) == 3:
            modules.append(pool(*layer))
        else:
            modules += [convolution(inputs, *layer), norm(layer[0]), nn.ReLU(inplace=True)]
            inputs = layer[0]
    return nn.Sequential(*modules)


def _projection() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 1024))


class SyncNet(nn.Module):
    """The two towers under their published names."""

    def __init__(self):
        super().__init__()
        self.netcnnaud = _tower(1, AUDIO_LAYERS, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
        self.netfcaud = _projection()
        self.netcnnlip = _tower(3, LIP_LAYERS, nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d)
        self.netfclip = _projection()

    def sound(self, windows: Tensor) -> Tensor:
        """(B, 13, 20) MFCCs -> (B, 1024)."""
        return self.netfcaud(self.netcnnaud(windows[:, None]).flatten(1))

    def lips(self, windows: Tensor) -> Tensor:
        """(B, 3, 5, 224, 224) BGR, 0 to 255 -> (B, 1024)."""
        return self.netfclip(self.netcnnlip(windows).flatten(1))


def load_syncnet() -> SyncNet | None:
    """The network with the user's weights; None where there are none. Raises UserError if they do not fit exactly."""
    weights = model_store.find("syncnet")
    if weights is None:
        return None
    network = SyncNet()
    load_strictly(network, read_tensors(weights, "syncnet"), weights, "syncnet")
    return network.eval().requires_grad_(False)


@functools.cache
def _filters() -> np.ndarray:
    """(257, 26) triangles on the mel scale (2595 log10(1 + f / 700)) from 0 to 8 kHz, their corners on whole bins."""
    corners = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), FILTERS + 2)
    bins = np.floor((TRANSFORM + 1) * 700 * (10 ** (corners / 2595) - 1) / SAMPLE_RATE)
    left, top, right = bins[:-2], bins[1:-1], bins[2:]
    k = np.arange(TRANSFORM // 2 + 1)[:, None]
    return np.where(k < top, np.clip((k - left) / (top - left), 0, None), np.clip((right - k) / (right - top), 0, None))


def mfcc(samples: np.ndarray) -> np.ndarray:
    """(13, T) of (S,) samples in [-1, 1] at 16 kHz, taken as 16-bit numbers: row 0 is the log energy, the rest are liftered."""
    samples = np.asarray(samples, np.float64) * 32768
    emphasised = np.append(samples[:1], samples[1:] - EMPHASIS * samples[:-1])
    count = 1 + max(0, -(-(len(samples) - WINDOW) // HOP))
    padded = np.pad(emphasised, (0, max(0, (count - 1) * HOP + WINDOW - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:count]
    power = np.square(np.abs(np.fft.rfft(frames, TRANSFORM))) / TRANSFORM
    least = np.finfo(float).eps
    bands = np.log(np.maximum(power @ _filters(), least))
    k, n = np.arange(COEFFICIENTS)[:, None], np.arange(FILTERS)
    cosines = np.cos(np.pi * k * (2 * n + 1) / (2 * FILTERS)) * np.sqrt(np.where(k == 0, 1, 2) / FILTERS)
    lift = 1 + LIFTER / 2 * np.sin(np.pi * np.arange(COEFFICIENTS) / LIFTER)
    result = (bands @ cosines.T) * lift
    result[:, 0] = np.log(np.maximum(power.sum(1), least))
    return result.T.astype(np.float32)


def face_boxes(landmarks: np.ndarray) -> np.ndarray:
    """(F, 3): centre x, y and half the side of a box around the face from the forehead to the chin, steadied over 13 frames.

    landmarks (F, 68, 2); frames without a face take the nearest one's. Raises UserError if no frame has a face.
    """
    seen = np.isfinite(landmarks[:, 0, 0])
    if not seen.any():
        raise UserError("no frame shows a face, so lips and sound cannot be compared")
    nearest = np.abs(np.arange(len(seen))[:, None] - np.flatnonzero(seen)).argmin(1)
    marks = landmarks[np.flatnonzero(seen)[nearest]]
    low, high = marks.min(1), marks.max(1)
    low[:, 1] -= 0.25 * (high - low)[:, 1]  # the landmarks end at the brows
    boxes = np.concatenate([(low + high) / 2, (high - low).max(1, keepdims=True) / 2], 1)
    padded = np.pad(boxes, ((6, 6), (0, 0)), "edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 13, axis=0), -1)


def crop(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(224, 224, 3) uint8 BGR of an (H, W, 3) RGB frame: the box and 0.4 of it on each side, none above."""
    x, y, half = box
    side = half * (2 + 2 * MARGIN)
    scale = SIDE / side
    moved = np.float32([[scale, 0, -scale * (x - side / 2)], [0, scale, -scale * (y - half)]])
    face = cv2.warpAffine(frame, moved, (SIDE, SIDE), flags=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR,
                          borderValue=(GREY, GREY, GREY))  # fmt: skip
    return np.ascontiguousarray(face[..., ::-1])


def scores(network: SyncNet, frames: Iterable[np.ndarray], landmarks: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """LSE_D, LSE_C and AVOffset (frames by which the sound comes early) of consecutive (H, W, 3) uint8 frames and their sound.

    samples (S,) at 16 kHz, 640 a frame. Raises UserError if there are fewer frames than a window has or no face in any.
    """
    boxes, device = face_boxes(landmarks), next(network.parameters()).device
    sound = torch.from_numpy(mfcc(samples))
    count = min(len(landmarks), len(samples) * 25 // SAMPLE_RATE, sound.shape[1] // PER_FRAME) - FRAMES + 1
    if count < 1:
        raise UserError(f"SyncNet needs {FRAMES} frames with sound; render a longer clip")
    heard = sound.unfold(1, FRAMES * PER_FRAME, PER_FRAME).transpose(0, 1)[:count]
    of_sound = torch.cat([network.sound(piece.to(device)) for piece in heard.split(BATCH)])
    of_lips, held = [], []
    for k, frame in enumerate(frames):
        held.append(torch.from_numpy(crop(frame, boxes[k])))
        if k + 1 == count + FRAMES - 1 or len(held) == BATCH + FRAMES - 1:
            windows = torch.stack(held).unfold(0, FRAMES, 1).permute(0, 3, 4, 1, 2)  # (B, 3, 5, 224, 224)
            of_lips.append(network.lips(windows.to(device).float()))
            held = held[1 - FRAMES :]
        if k + 1 == count + FRAMES - 1:
            break
    padded = F.pad(of_sound, (0, 0, REACH, REACH))
    distances = torch.stack([F.pairwise_distance(torch.cat(of_lips), padded[k : k + count]).mean() for k in range(2 * REACH + 1)])
    least, at = distances.min(0)
    return {"LSE_D": float(least), "LSE_C": float(distances.median() - least), "AVOffset": REACH - int(at)}
