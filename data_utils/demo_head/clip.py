"""The files of the synthetic talking head: its clip, its voice and their truth (data_utils/make_demo.py says what each holds)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data_utils.demo_head.landmarks import Landmarks, lip_opening
from data_utils.demo_head.mesh import HeadMesh
from data_utils.demo_head.motion import DISTANCE, poses
from data_utils.demo_head.shading import HeadRenderer
from data_utils.demo_head.voice import Utterance, speak
from utils.audio import save_wav
from utils.files import write_npz
from utils.image import write_parsing
from utils.pose import project
from utils.progress import progress
from utils.video import VideoWriter

FOCAL = 1200 / 512  # in frame sides
HELD_OUT = 1000  # added to the seed for the utterance that is not in the clip


def make_speech(out: Path, seconds: float = 6.0, seed: int = 0, mesh: HeadMesh | None = None) -> Utterance:
    """Write out/speech.wav and out/truth/speech.npz: the held-out utterance."""
    mesh = mesh or HeadMesh()
    utterance = speak(seconds, seed + HELD_OUT)
    marks = Landmarks(mesh)
    opening = np.array([lip_opening(marks.points(mesh.deform(row), 0.0)) for row in utterance.articulation])
    save_wav(out / "speech.wav", utterance.samples)
    write_npz(out / "truth" / "speech.npz", lip_opening=opening.astype(np.float32), **_spoken(utterance))
    return utterance


def make_clip(out: Path, seconds: float = 12.0, size: int = 256, seed: int = 0, masks: bool = True) -> None:
    """Write out/demo.mp4 and its truth."""
    utterance = speak(seconds, seed)
    focal = FOCAL * size
    renderer = HeadRenderer(size, focal, seed, DISTANCE)
    marks = Landmarks(renderer.mesh)
    frames, euler, trans = poses(len(utterance.articulation), seed)
    points = []
    with VideoWriter(out / "demo.mp4", size, size, audio=utterance.samples, crf=12) as writer:
        for i, pose in enumerate(progress(frames, label="demo head")):
            picture, classes = renderer.render(pose, utterance.articulation[i])
            writer.add(picture)
            if masks:
                write_parsing(out / "truth" / "masks" / f"{i}.png", classes)
            points.append(marks.points(renderer.mesh.deform(utterance.articulation[i]), pose.blink))
    points = np.stack(points)
    rotation = np.stack([p.rotation for p in frames])
    camera = points @ rotation.transpose(0, 2, 1) + trans[:, None]
    pixels = project(*(torch.from_numpy(a) for a in (points, rotation, trans)), focal, size / 2, size / 2).numpy()
    write_npz(
        out / "truth" / "truth.npz",
        landmarks68=pixels.astype(np.float32), points68=points.astype(np.float32), visible=_visible(camera),
        euler=euler.astype(np.float32), trans=trans.astype(np.float32), focal=np.float32(focal),
        lip_opening=lip_opening(points).astype(np.float32), blink=np.array([p.blink for p in frames], np.float32),
        **_spoken(utterance),
    )  # fmt: skip


def _spoken(utterance: Utterance) -> dict[str, np.ndarray]:
    return {
        "articulation": utterance.articulation.astype(np.float32),
        "phonemes": np.array([symbol for symbol, _, _ in utterance.phonemes]),
        "phoneme_times": np.array([(start, end) for _, start, end in utterance.phonemes], np.float32),
    }


def _visible(camera: np.ndarray) -> np.ndarray:
    """(F, 68) bool: only the contour's ends can turn away; one is hidden when it lies inside the outline of its half."""
    visible = np.ones(camera.shape[:2], bool)
    screen = camera[..., 0] / -camera[..., 2]
    left, right = screen[:, :8], screen[:, 9:17]
    visible[:, :7] = left[:, :7] <= left[:, 1:] + 1e-3
    visible[:, 10:17] = right[:, 1:] >= right[:, :-1] - 1e-3
    return visible
