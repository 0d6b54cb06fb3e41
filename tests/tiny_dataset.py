"""A data set folder of a few 64-pixel frames, written directly: what readers, training and rendering are tested on.

A coloured disc (the face) with a dark mouth whose height follows the one audio feature that is not noise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from utils.audio import save_wav
from utils.constants import CLOTH, DM_PER_M, HAIR, MOUTH, NECK, SAMPLES_PER_FRAME, SKIN
from utils.dataset_folder import DatasetFolder
from utils.files import write_json, write_npy
from utils.image import write_parsing, write_rgb
from utils.ply import write_mesh
from utils.pose import camera_to_world, euler_to_matrix, project

SIDE, FOCAL, DISTANCE = 64, 150.0, 7.0


def opening(i: int) -> float:
    """How far the mouth is open in frame i, 0 to 1."""
    return 0.5 + 0.5 * np.sin(i * 1.3)


def write_tiny_dataset(root: Path, frames: int = 22, encoder: str = "mel") -> DatasetFolder:
    """Write the folder and return it; frame 3 is dropped as unusable, the ids of the others stay."""
    folder = DatasetFolder(root)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    plate = np.full((SIDE, SIDE, 3), (40, 90, 60), np.uint8)
    write_rgb(folder.background, plate)
    euler = torch.zeros(frames, 3)
    euler[:, 1] = torch.linspace(-0.1, 0.1, frames)
    rotation, translation = euler_to_matrix(euler), torch.tensor([0.0, 0.0, -DISTANCE]).expand(frames, 3)
    angles = rng.uniform(0, 2 * np.pi, 400)
    radii = np.sqrt(rng.uniform(0, 1, 400))
    face = np.stack([0.8 * radii * np.cos(angles), 0.8 * radii * np.sin(angles), 0.3 * (1 - radii**2)], 1).astype(np.float32)
    mouth_points = torch.tensor([[0.0, -0.35, 0.25]])
    for i in range(frames):
        u, v = project(mouth_points, rotation[i : i + 1], translation[i : i + 1], FOCAL, SIDE / 2, SIDE / 2)[0, 0].tolist()
        half = 1 + 4 * opening(i)
        skin = (x - SIDE / 2) ** 2 + (y - SIDE / 2) ** 2 < 18**2
        hair = skin & (y < 20)
        mouth = ((x - u) / 6) ** 2 + ((y - v) / half) ** 2 < 1
        neck = (np.abs(x - SIDE / 2) < 6) & (y > 45) & ~skin
        torso = (y > 56) & ~neck
        image, classes = plate.copy(), np.zeros((SIDE, SIDE), np.uint8)
        for region, colour, label in ((torso, (60, 60, 150), CLOTH), (neck, (200, 150, 130), NECK), (skin, (220, 170, 150), SKIN),
                                      (hair, (70, 50, 30), HAIR), (mouth, (90, 20, 30), MOUTH)):  # fmt: skip
            image[region], classes[region] = colour, label
        write_rgb(folder.frame(i), image)
        write_rgb(folder.gt(i), image)
        write_parsing(folder.parsing(i), classes)
        body = np.concatenate([np.where((neck | torso)[..., None], image, 0), 255 * (neck | torso)[..., None]], 2).astype(np.uint8)
        write_rgb(folder.torso(i), body)
        landmarks = np.full((68, 2), SIDE / 2) + rng.normal(0, 3, (68, 2))
        landmarks[48:68] = (u, v) + np.stack([6 * np.cos(np.linspace(0, 6, 20)), half * np.sin(np.linspace(0, 6, 20))], 1)
        np.savetxt(folder.landmarks(i), landmarks, fmt="%f")
    features = rng.normal(0, 0.1, (frames, 12)).astype(np.float32)
    features[:, 0] = [opening(i) for i in range(frames)]
    write_npy(folder.audio_features(encoder), features)
    write_npy(folder.blendshapes, rng.uniform(0, 0.2, (frames, 52)).astype(np.float32))
    save_wav(folder.audio, rng.normal(0, 0.1, frames * SAMPLES_PER_FRAME))
    write_json(folder.crop, {"source_width": SIDE, "source_height": SIDE, "x": 0, "y": 0, "side": SIDE, "size": SIDE})
    valid = [i for i in range(frames) if i != 3]
    write_json(folder.valid, {"valid": valid, "dropped": {"3": "no face"}})
    write_mesh(folder.fused, face, np.tile(np.float32([0, 0, 1]), (400, 1)), np.tile(np.float32([0.8, 0.6, 0.5]), (400, 1)))
    poses = camera_to_world(rotation, translation / DM_PER_M)
    split = len(valid) * 10 // 11
    for name, ids in (("train", valid[:split]), ("val", valid[split:])):
        write_json(folder.transforms(name), {
            "focal_len": FOCAL, "cx": SIDE / 2, "cy": SIDE / 2, "unit": "m", "width": SIDE, "height": SIDE,
            "frames": [{"img_id": i, "aud_id": i, "transform_matrix": poses[i].tolist()} for i in ids],
        })  # fmt: skip
    return folder
