"""Fixtures the whole suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(2)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and weights (SGT_SHARED, default ../shared); tests that want it skip where it is absent."""
    folder = Path(os.environ.get("SGT_SHARED", ROOT.parent / "shared"))
    if not (folder / "videos").is_dir():
        pytest.skip(f"needs the real clips and weights of SGT_SHARED ({folder} is absent)")
    return folder


@pytest.fixture(scope="session")
def demo_clip(tmp_path_factory) -> Path:
    """A short clip of the synthetic head, demo.mp4 with truth/truth.npz beside it: 4.4 s, 192 x 192."""
    from data_utils.demo_head.clip import make_clip

    folder = tmp_path_factory.mktemp("demo clip")
    make_clip(folder, 4.4, 192, masks=False)
    return folder / "demo.mp4"


@pytest.fixture(scope="session")
def processed(demo_clip, tmp_path_factory):
    """(data set folder, truth arrays) of the synthetic clip after stages 2, 6 and 9 of process.py, an unbroken run at 128."""
    from data_utils import process
    from utils.dataset_folder import DatasetFolder
    from utils.files import read_json, read_npz

    home = tmp_path_factory.mktemp("processed")
    before = os.getcwd()
    os.chdir(home)
    try:
        for stage in (2, 6, 9):
            process.main([str(demo_clip), "--size", "128", "--task", str(stage)])
    finally:
        os.chdir(before)
    folder, truth = DatasetFolder(home / "data" / "demo"), read_npz(demo_clip.parent / "truth" / "truth.npz")
    crop = read_json(folder.crop)
    truth["landmarks68"] = (truth["landmarks68"] - (crop["x"], crop["y"])) * (crop["size"] / crop["side"])
    return folder, truth
