"""Stage 10: units, split and matrix of transforms_*.json."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch

from data_utils import transforms
from utils.audio import save_wav
from utils.constants import SAMPLES_PER_FRAME
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.image import write_rgb
from utils.pose import euler_to_matrix, project, world_to_view

FRAMES, WIDTH, HEIGHT, FOCAL = 25, 64, 48, 150.0
VALID = [i for i in range(FRAMES) if i not in (0, 7, 8)]


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    """A folder as stages 2 to 8 leave it: 25 frames, three dropped; tracker (dm) and bundle adjustment (m) differ by a turn."""
    folder = DatasetFolder(tmp_path)
    for i in range(FRAMES):
        write_rgb(folder.frame(i), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    folder.valid.write_text(json.dumps({"valid": VALID, "dropped": {}}))
    generator = torch.Generator().manual_seed(0)
    euler, trans = torch.randn(2, FRAMES, 3, generator=generator) * torch.tensor([0.2, 1.0])[:, None, None]
    trans = trans - torch.tensor([0, 0, 7.0])
    torch.save({"euler": euler + 0.1, "trans": trans, "focal": torch.tensor([FOCAL - 1])}, folder.track_params)
    torch.save({"euler": euler, "trans": trans / 10, "focal": torch.tensor([FOCAL])}, folder.bundle_adjustment)
    return folder


def run(folder: DatasetFolder, use_3dmm: bool = False, av_offset: str | int = "auto") -> tuple[dict, dict, dict]:
    facts = transforms.run(folder, argparse.Namespace(use_3dmm=use_3dmm, av_offset=av_offset))
    return facts, *(json.loads(folder.transforms(name).read_text()) for name in ("train", "val"))


def test_the_first_ten_elevenths_of_the_usable_frames_train_and_ids_are_kept(folder):
    facts, train, val = run(folder)
    ids = [[frame["img_id"] for frame in part["frames"]] for part in (train, val)]
    assert ids[0] == VALID[: int(len(VALID) * 10 / 11)] and ids[0] + ids[1] == VALID
    assert all(frame["aud_id"] == frame["img_id"] for part in (train, val) for frame in part["frames"])
    assert (facts["train"], facts["val"]) == (20, 2)


@pytest.mark.parametrize("use_3dmm", [False, True])
def test_a_stored_camera_sees_points_where_the_tracker_does(folder, use_3dmm):
    _, train, _ = run(folder, use_3dmm)
    assert train["unit"] == "m" and (train["cx"], train["cy"]) == (32, 24) and (train["width"], train["height"]) == (WIDTH, HEIGHT)
    params = torch.load(folder.track_params if use_3dmm else folder.bundle_adjustment, weights_only=True)
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5  # dm
    for frame in train["frames"][:5]:
        i = frame["img_id"]
        trans = params["trans"][i : i + 1].double() * (1 if use_3dmm else 10)
        rotation = euler_to_matrix(params["euler"][i : i + 1].double())
        expected = project(points, rotation, trans, float(params["focal"][0]), 32, 24)[0]
        c2w = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
        c2w[:3, 3] *= 10
        x, y, z = (points @ world_to_view(c2w)[:3, :3].T + world_to_view(c2w)[:3, 3]).unbind(1)
        seen = torch.stack([32 + train["focal_len"] * x / z, 24 + train["focal_len"] * y / z], 1)
        assert (z > 0).all() and torch.allclose(seen, expected, atol=1e-4)


def test_a_missing_pose_file_is_named_with_its_stage(folder):
    folder.bundle_adjustment.unlink()
    with pytest.raises(UserError, match="bundle_adjustment.pt is missing; stage 8"):
        run(folder)


def test_poses_of_another_clip_are_refused(folder):
    torch.save({"euler": torch.zeros(10, 3), "trans": torch.zeros(10, 3), "focal": torch.ones(1)}, folder.bundle_adjustment)
    with pytest.raises(UserError, match="10 poses, but frame 24"):
        run(folder)


@pytest.mark.parametrize("offset", [-3, 2])
def test_a_moved_sound_is_told_by_the_frames_rows_and_frames_without_sound_are_left_out(folder, offset):
    facts, train, val = run(folder, av_offset=offset)
    frames = train["frames"] + val["frames"]
    assert facts["av_offset_applied"] == offset
    assert all(frame["aud_id"] == frame["img_id"] - offset for frame in frames)
    assert [frame["img_id"] for frame in frames] == [i for i in VALID if 0 <= i - offset <= VALID[-1]]


def test_frames_beyond_the_end_of_the_sound_are_left_out_but_for_two(folder, monkeypatch):
    monkeypatch.setattr(transforms, "sound_offset", lambda folder, wanted: (wanted, {}))
    save_wav(folder.audio, np.zeros(15 * SAMPLES_PER_FRAME))
    _, train, val = run(folder, av_offset=0)
    assert [frame["img_id"] for frame in train["frames"] + val["frames"]] == [i for i in VALID if i <= 16]
