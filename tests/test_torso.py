"""Stage 5: the frame on the plate, and the torso with its neck continued under the head."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from data_utils import torso
from utils.constants import BACKGROUND, CLOTH, HAIR, HEAD_CLASSES, NECK, SKIN
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.image import read_rgb, read_rgba, write_parsing, write_rgb

SIDE = 256
NECK_RGB, CLOTH_RGB, SKIN_RGB, WALL_RGB = (180, 120, 100), (30, 40, 90), (220, 170, 150), (10, 200, 10)


def figure(neck: bool = True, top: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """A block figure: head over (neck over) shoulders, before a wall; picture and classes."""
    classes = np.zeros((SIDE, SIDE), np.uint8)
    classes[210 if neck else 170 :, 40:216] = CLOTH
    if neck:
        classes[150:210, 100:156] = NECK
    classes[top:170, 80:176] = SKIN
    classes[top : top + 30, 80:176] = HAIR
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    for label, colour in ((BACKGROUND, WALL_RGB), (NECK, NECK_RGB), (CLOTH, CLOTH_RGB), (SKIN, SKIN_RGB), (HAIR, (0, 0, 0))):
        picture[classes == label] = colour
    return picture, classes


def test_outside_the_head_the_body_is_the_frames_own_and_the_wall_is_transparent():
    picture, classes = figure()
    image = torso.torso_image(picture, classes)
    assert image.shape == (SIDE, SIDE, 4) and image.dtype == np.uint8
    body = np.isin(classes, (NECK, CLOTH))
    assert (image[body, 3] == 255).all() and (image[body, :3] == picture[body]).all()
    assert image[5, 5, 3] == 0 and image[230, 20, 3] == 0
    assert (image[image[..., 3] == 0] == 0).all()


def test_the_neck_goes_on_under_the_head_in_its_own_colour_and_fades_out():
    picture, classes = figure()
    image = torso.torso_image(picture, classes)
    length = round(torso.NECK_LENGTH * SIDE / 512)
    column = image[:170, 128]  # above the seam at row 170
    assert (column[170 - length // 2 :, 3] == 255).all()
    assert (column[: 170 - length - 2, 3] == 0).all()
    assert (np.diff(column[170 - length - 2 :, 3].astype(int)) >= 0).all()
    painted = column[column[:, 3] > 0, :3].astype(int)
    assert np.abs(painted - NECK_RGB).max() <= 2
    # nothing of it shows beside the head
    assert (image[:165, :80, 3] == 0).all() and (image[:165, 176:, 3] == 0).all()


def test_the_seam_between_neck_and_its_continuation_has_no_step_and_no_streaks():
    picture, classes = figure()
    rng = np.random.default_rng(0)
    neck = classes == NECK
    shade = np.broadcast_to(np.linspace(-30, 30, SIDE)[None, :], classes.shape)
    noisy = np.array(NECK_RGB) + shade[..., None] + rng.normal(0, 8, picture.shape)
    picture[neck] = np.clip(noisy, 0, 255).astype(np.uint8)[neck]
    image = torso.torso_image(picture, classes).astype(float)
    seam = image[172:180, 104:152, :3].mean(0)
    above = image[166:169, 104:152, :3].mean(0)
    assert np.abs(seam - above).mean() < 5
    inside = image[150:168, 104:152, 0]
    assert np.abs(np.diff(inside, axis=1)).mean() < 1.5  # columns differ smoothly


def test_the_outline_of_the_filmed_chin_does_not_stay_on_the_neck():
    picture, classes = figure()
    picture[170:172, 100:156] = SKIN_RGB
    image = torso.torso_image(picture, classes)
    assert (image[160:176, 110:146, 3] == 255).all() and np.abs(image[160:176, 110:146, :3].astype(int) - NECK_RGB).max() <= 2


def test_beside_neck_and_cloth_too_the_body_goes_on_under_the_hair():
    picture, classes = figure()
    hair = np.zeros_like(classes, bool)
    hair[150:210, 76:100] = hair[190:230, 56:76] = True
    classes[hair], picture[hair] = HAIR, 0
    image = torso.torso_image(picture, classes)
    for k in range(1, round(torso.MARGIN * SIDE / 512)):
        for y, x, colour in ((200, 100 - k, NECK_RGB), (225, 55 + k, CLOTH_RGB)):
            assert image[y, x, 3] == 255 and np.abs(image[y, x, :3] - np.array(colour) * torso.DARKENING**k).max() <= 1
    assert (image[180:200, 80:94, 3] == 0).all()  # what the hair alone covers


def test_a_neck_that_is_absent_leaves_the_torso_alone_with_its_short_continuation():
    picture, classes = figure(neck=False)
    image = torso.torso_image(picture, classes)
    rows = max(1, round(torso.MARGIN * SIDE / 512))
    assert (image[170 - rows + 1 : 170, 128, 3] == 255).all() and image[170 - rows, 128, 3] == 0
    for k in range(1, rows):
        expected = np.array(CLOTH_RGB) * torso.DARKENING**k
        assert np.abs(image[170 - k, 128, :3] - expected).max() <= 1


def test_an_empty_frame_gives_an_empty_torso():
    picture, classes = figure()
    assert (torso.torso_image(picture, 0 * classes) == 0).all()
    assert (torso.torso_image(picture, np.full_like(classes, SKIN)) == 0).all()


def test_a_neck_at_the_top_of_the_picture_does_not_wrap_round():
    picture, classes = figure()
    up = np.roll(classes, -160, 0)
    up[96:] = BACKGROUND
    image = torso.torso_image(np.roll(picture, -160, 0), up)
    assert (image[110:, :, 3] == 0).all()
    assert image[5, 128, 3] == 255


def test_behind_a_collar_the_neck_goes_on_above_the_collars_continuation():
    picture, classes = figure()
    collar = np.zeros_like(classes, bool)
    collar[170:210, 88:100] = collar[170:210, 156:168] = True
    classes[collar], picture[collar] = CLOTH, CLOTH_RGB
    image = torso.torso_image(picture, classes)
    assert image[169, 94, 3] == 255 and np.abs(image[169, 94, :3].astype(int) - CLOTH_RGB).max() < 6
    assert image[155, 94, 3] == 255 and np.abs(image[155, 94, :3].astype(int) - NECK_RGB).max() < 6


def test_the_person_stands_on_the_plate_with_a_soft_outline():
    picture, classes = figure()
    plate = np.zeros_like(picture)
    image = torso.on_plate(picture, classes, plate)
    person = classes != BACKGROUND
    assert (image[person] == picture[person]).all()
    assert (image[100, :70] == 0).all()
    edge = image[100, 74:80, 1].astype(int)
    assert (np.diff(edge) >= 0).all() and 0 < edge[2] < WALL_RGB[1]


def test_composite_outside_the_head_is_the_frame_and_an_interrupted_run_continues(tmp_path):
    folder = DatasetFolder(tmp_path)
    picture, classes = figure()
    write_rgb(folder.background, np.full_like(picture, WALL_RGB), 100)
    for i in (0, 2):
        write_rgb(folder.frame(i), picture, 100)
        write_parsing(folder.parsing(i), classes)
    options = argparse.Namespace(force=False)
    facts = torso.run(folder, options)
    assert facts["frames"] == facts["written_now"] == 2 and not folder.torso(1).exists()
    image = read_rgba(folder.torso(2)).astype(float)
    alpha = image[..., 3:] / 255
    behind = image[..., :3] * alpha + read_rgb(folder.background) * (1 - alpha)
    error = (behind - read_rgb(folder.frame(2)))[~np.isin(classes, HEAD_CLASSES)]
    assert 10 * np.log10(255**2 / (error**2).mean()) > 35
    folder.gt(2).write_bytes(folder.gt(2).read_bytes()[:-9])
    assert torso.run(folder, options)["written_now"] == 1
    assert read_rgb(folder.gt(2)).shape == picture.shape
    assert torso.run(folder, argparse.Namespace(force=True))["written_now"] == 2


def test_a_missing_plate_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="bc.jpg.*stage 4"):
        torso.run(DatasetFolder(tmp_path), argparse.Namespace(force=False))
