"""How the head moves while it speaks: smooth small turns about the neck, a calmer torso, blinks and glances."""

from __future__ import annotations

import numpy as np
import torch

from data_utils.demo_head.shading import Pose
from utils.constants import FPS
from utils.pose import euler_to_matrix

DISTANCE, HEIGHT = 8.3, 0.20  # dm from the camera; how far the head's origin lies above the optical axis
PIVOT = np.array([0.0, -1.15, -0.35])  # the head turns about the top of the spine
TURN = np.radians([2.6, 5.0, 2.0])  # standard pitch, yaw and roll
SHIFT = np.array([0.050, 0.025, 0.070])  # dm


def _drift(rng: np.random.Generator, time: np.ndarray, slow: float, fast: float) -> np.ndarray:
    """A smooth random curve of about unit size: five sines of random frequency and phase."""
    frequency = np.exp(rng.uniform(np.log(slow), np.log(fast), 5))
    phase = rng.uniform(0, 2 * np.pi, 5)
    return np.sin(2 * np.pi * frequency * time[:, None] + phase).sum(1) / 1.9


def _blinks(rng: np.random.Generator, frames: int) -> np.ndarray:
    """(F,) 0 open .. 1 closed; 80 ms to close, 40 ms shut, 160 ms to open, every 1.6 to 4 s."""
    blink, now = np.zeros(frames), rng.uniform(0.5, 0.9)
    time = np.arange(frames) / FPS
    while now < frames / FPS:
        now = round(now * FPS) / FPS  # a frame shows the lids shut
        t = time - now
        blink = np.maximum(blink, np.clip(np.minimum((t + 0.12) / 0.10, (0.20 - t) / 0.18), 0, 1))
        now += rng.uniform(1.6, 4.0)
    return blink * blink * (3 - 2 * blink)


def poses(frames: int, seed: int) -> tuple[list[Pose], np.ndarray, np.ndarray]:
    """Poses of all frames, and the head's euler (F, 3) radians and trans (F, 3) dm in the convention of utils/pose.py."""
    rng = np.random.default_rng([seed, 11])
    time = np.arange(frames) / FPS
    euler = np.stack([_drift(rng, time, 0.10, 0.55) for _ in range(3)], 1) * TURN
    shift = np.stack([_drift(rng, time, 0.06, 0.35) for _ in range(3)], 1) * SHIFT
    rotation = euler_to_matrix(torch.from_numpy(euler)).numpy()
    place = np.array([0.0, HEIGHT, -DISTANCE]) + shift
    translation = place + PIVOT - rotation @ PIVOT
    sway = euler_to_matrix(torch.from_numpy(euler * [0.05, 0.12, 0.10])).numpy()
    below = place + PIVOT - sway @ PIVOT  # the pivot joins both
    blink = _blinks(rng, frames)
    # the eyes hold the camera while the head turns, with a small glance now and then
    glance = np.zeros((frames, 2))
    at = 0
    while at < frames:
        hold = int(rng.uniform(0.6, 2.0) * FPS)
        glance[at : at + hold] = rng.normal(size=2) * [0.010, 0.004]
        at += hold
    gaze = glance + 0.12 * np.stack([-euler[:, 1], euler[:, 0]], 1)
    made = [Pose(rotation[i], translation[i], sway[i], below[i], float(blink[i]), gaze[i]) for i in range(frames)]
    return made, euler, translation
