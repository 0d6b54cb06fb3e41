"""Fixtures the whole suite shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and weights (SGT_SHARED, default ../shared); tests that want it skip where it is absent."""
    folder = Path(os.environ.get("SGT_SHARED", ROOT.parent / "shared"))
    if not (folder / "videos").is_dir():
        pytest.skip(f"needs the real clips and weights of SGT_SHARED ({folder} is absent)")
    return folder
