"""The contact sheet shows the frames it names, from videos and folders, alone or beside others."""

import subprocess
import sys

import numpy as np
import pytest

from utils.contact_sheet import contact_sheet, grid, inscribe, label, spread, writing
from utils.errors import UserError
from utils.image import read_rgb, write_rgb
from utils.video import VideoWriter


@pytest.fixture
def video(tmp_path):
    """40 frames; frame i is grey of level 5 i."""
    path = tmp_path / "a clip 视频.mp4"
    with VideoWriter(path, 64, 48, lossless=True) as writer:
        for i in range(40):
            writer.add(np.full((48, 64, 3), 5 * i, np.uint8))
    return path


def test_frames_are_spread_from_the_start_to_the_last(video):
    levels = [int(frame[0, 0, 0]) // 5 for _, frame in spread(video, 4)]
    assert levels == [0, 13, 26, 39]
    assert [int(frame[0, 0, 0]) // 5 for _, frame in spread(video, 3, start=19)] == [19, 29, 39]
    assert [name for name, _ in spread(video, 2)] == ["0 (0.00 s)", "39 (1.56 s)"]


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for i in (0, 2, 10, 11):
        write_rgb(tmp_path / f"{i}.png", np.full((16, 16, 3), i, np.uint8))
    write_rgb(tmp_path / "mask.png", np.full((16, 16, 3), 99, np.uint8))
    assert [(name, frame[0, 0, 0]) for name, frame in spread(tmp_path, 9)] == [("0", 0), ("2", 2), ("10", 10), ("11", 11)]


def test_the_sheet_shows_both_videos_side_by_side(video, tmp_path):
    for i in range(40):
        write_rgb(tmp_path / "other" / f"{i}.png", np.full((48, 64, 3), (200, 0, 0), np.uint8))
    sheet = contact_sheet(video, count=4, columns=2, compare=tmp_path / "other", tile=96)
    assert sheet.shape == (2 * 96 + 2, 2 * 256 + 2, 3)
    assert sheet[180, 60].tolist() == [130] * 3 and sheet[180, 190].tolist() == [200, 0, 0]  # frame 26 and its partner


def test_a_label_darkens_its_corner_only():
    image = np.full((128, 128, 3), 90, np.uint8)
    marked = label(image, "7")
    assert marked[:20, :20].max() > 200 and marked[1, 1].tolist() == [30] * 3 and (marked[40:] == 90).all()
    assert (image == 90).all()
    many = np.stack([image, image[::-1]])[..., 0]
    inscribe(many, writing("7", 128))
    assert (many == marked[..., 0]).all()


def test_tiles_of_other_sizes_are_fitted_and_missing_ones_stay_dark():
    sheet = grid([np.full((8, 8, 3), 100, np.uint8), np.full((16, 16, 3), 200, np.uint8), np.zeros((8, 8, 3), np.uint8)], 2, gap=0)
    assert sheet.shape == (16, 16, 3) and sheet[4, 12, 0] == 200 and sheet[12, 12, 0] == 24


def test_a_start_beyond_the_end_is_refused_by_name(video):
    with pytest.raises(UserError, match="a clip 视频.mp4.*frame 40"):
        list(spread(video, 4, start=40))


def test_the_command_writes_a_sheet_beside_the_video(video):
    done = subprocess.run([sys.executable, "-m", "utils.contact_sheet", str(video), "--count", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_rgb(video.with_name("a clip 视频_sheet.png")).shape == (256, 4 * 341 + 6, 3)
    done = subprocess.run([sys.executable, "-m", "utils.contact_sheet", str(video) + "x"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "does not exist" in done.stderr
