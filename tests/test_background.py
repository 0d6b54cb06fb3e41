"""Stage 4: the background plate."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from scipy.spatial import cKDTree

from data_utils import background
from utils.constants import CLOTH, HAIR
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.image import read_rgb, write_parsing, write_rgb


def test_distance_to_the_person_equals_a_nearest_neighbour_search():
    rng = np.random.default_rng(0)
    classes = (rng.random((40, 50)) < 0.02).astype(np.uint8) * HAIR
    pixels = np.argwhere(np.ones_like(classes))
    nearest, _ = cKDTree(np.argwhere(classes)).query(pixels)
    np.testing.assert_allclose(background.distance_to_person(classes).ravel(), nearest, rtol=1e-6)


def test_each_pixel_comes_from_the_frame_in_which_the_person_is_farthest():
    near, far = np.full((4, 6), 7.0, np.float32), np.full((4, 6), 9.0, np.float32)
    far[:, :2] = 0
    plate, seen = background.background_plate(
        [(np.full((4, 6, 3), 10, np.uint8), near), (np.full((4, 6, 3), 20, np.uint8), far)])  # fmt: skip
    assert seen == 1
    assert (plate[:, :2] == 10).all() and (plate[:, 2:] == 20).all()


def test_pixels_never_seen_take_the_colour_of_the_nearest_safe_one():
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :, 0] = np.arange(40) * 5
    distance = np.maximum(np.abs(np.arange(40) - 20)[None, :] - 2.0, 0).repeat(20, 0).astype(np.float32)
    plate, seen = background.background_plate([(picture, distance)])
    safe = distance[0] > background.SAFE_DISTANCE
    assert seen == pytest.approx(safe.mean())
    assert (plate[:, safe] == picture[:, safe]).all()
    assert (plate[5, 13:20, 0] == picture[5, 12, 0]).all() and (plate[5, 21:28, 0] == picture[5, 28, 0]).all()


def test_a_picture_that_the_person_fills_is_refused():
    with pytest.raises(UserError, match="no background is visible"):
        background.background_plate([(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.float32))])


def test_the_plate_of_a_walking_person_is_the_empty_room(tmp_path):
    folder = DatasetFolder(tmp_path)
    rng = np.random.default_rng(1)
    room = np.kron(rng.integers(0, 255, (8, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    for i in range(60):
        classes = np.zeros(room.shape[:2], np.uint8)
        classes[20:, i : i + 20] = CLOTH
        frame = room.copy()
        frame[classes > 0] = 255
        write_rgb(folder.frame(i), frame, 100)
        if i % 3:  # frames without a face have no parsing
            write_parsing(folder.parsing(i), classes)
    facts = background.run(folder, argparse.Namespace(force=False))
    assert facts["frames"] >= background.AT_LEAST and facts["seen"] == 1
    assert np.abs(read_rgb(folder.background).astype(int) - room).mean() < 2


def test_a_folder_that_was_not_parsed_names_the_missing_file_and_the_stage(tmp_path):
    with pytest.raises(UserError, match="parsing.*stage 3"):
        background.run(DatasetFolder(tmp_path), argparse.Namespace(force=False))
