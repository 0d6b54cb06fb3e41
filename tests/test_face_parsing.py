"""Stage 3: the embedded parsing, its parts, and its agreement with the synthetic head's truth."""

from __future__ import annotations

import argparse

import cv2
import numpy as np
import pytest

from data_utils import face_parsing
from data_utils.face_parsing import mesh
from data_utils.face_parsing.bisenetv2 import crop_transform, paste
from data_utils.face_parsing.clip import Clip
from data_utils.face_parsing.edges import average_over_time, guided_upsample
from data_utils.face_parsing.embedded import FrameParser
from data_utils.face_parsing.steady import steadied, with_neighbours
from data_utils.per_frame import is_whole, ordered_map
from utils import model_store
from utils.constants import BACKGROUND, CLOTH, HAIR, HEAD_CLASSES, MOUTH, NECK, SKIN
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import write_npz
from utils.image import read_parsing, read_rgb, write_rgb
from utils.video import read_frames

SIDE = 192
SKIN_RGB, HAIR_RGB, SUIT_RGB, SHIRT_RGB, WALL_RGB = (205, 150, 125), (62, 45, 36), (40, 36, 40), (225, 228, 235), (90, 130, 180)


def face_mesh(centre=(96.0, 80.0), half=(32.0, 40.0), jaw: float = 0.0) -> np.ndarray:
    """(478, 2) a cartoon of the face mesh: an oval, eyes, brows, nose and lips; `jaw` pixels of opening."""
    cx, cy = centre
    points = np.tile(np.float32([cx, cy]), (478, 1))

    def ring(indices, x, y, rx, ry):
        angle = 2 * np.pi * np.arange(len(indices)) / len(indices)
        points[list(indices)] = np.stack([x + rx * np.sin(angle), y - ry * np.cos(angle)], 1)

    ring(mesh.OVAL, cx, cy, *half)
    below = points[:, 1] > cy
    points[below, 1] += jaw * (points[below, 1] - cy) / half[1]
    for label, indices in mesh.PARTS[:5]:
        side = -1 if label in (mesh.LEFT_BROW, mesh.LEFT_EYE) else 1
        if label == mesh.NOSE:
            ring(indices, cx, cy + 4, 6, 10)
        else:
            ring(indices, cx + side * 13, cy - 7 - 8 * (label in (mesh.LEFT_BROW, mesh.RIGHT_BROW)), 6, 2.5)
    points[[33, 133, 263, 362]] = [[cx - 19, cy - 7], [cx - 7, cy - 7], [cx + 19, cy - 7], [cx + 7, cy - 7]]
    points[[168, 6, 197, 195, 5, 4], 1] = cy + np.arange(-6, 12, 3)
    lips = mesh.PARTS[5][1][:11], mesh.PARTS[6][1][:11]
    inner = mesh.PARTS[5][1][11:][::-1], mesh.PARTS[6][1][11:][::-1]
    across = np.linspace(-1, 1, 11)
    arch = 1 - across**2
    for (upper, lower), width, thickness in ((lips, 12, 4), (inner, 10, 1)):
        points[list(upper)] = np.stack([cx + width * across, cy + 20 - thickness * arch], 1)
        points[list(lower)] = np.stack([cx + width * across, cy + 20 + (thickness + jaw) * arch], 1)
    return points


def portrait(points: np.ndarray, suit=SUIT_RGB) -> tuple[np.ndarray, np.ndarray]:
    """Picture (SIDE, SIDE, 3) uint8 and its true classes: wall, shoulders, shirt, neck, hair, ears' place left bare, face."""
    picture = np.full((SIDE, SIDE, 3), WALL_RGB, np.uint8)
    truth = np.zeros((SIDE, SIDE), np.uint8)
    chin, cx = points[mesh.CHIN, 1], points[mesh.CHIN, 0]
    shaded = tuple(int(c * 0.8) for c in SKIN_RGB)
    shapes = (
        (CLOTH, suit, [[0, SIDE], [20, 152], [70, 135], [122, 135], [172, 152], [SIDE, SIDE]]),
        (CLOTH, SHIRT_RGB, [[cx - 20, 136], [cx, 175], [cx + 20, 136]]),
        (NECK, shaded, [[cx - 19, chin - 20], [cx - 19, 137], [cx, 155], [cx + 19, 137], [cx + 19, chin - 20]]),
    )  # fmt: skip
    for label, colour, corners in shapes:
        corners = np.round(np.array(corners) * 16).astype(np.int32)
        cv2.fillPoly(picture, [corners], colour, shift=4)
        cv2.fillPoly(truth, [corners], label, shift=4)
    top = points[mesh.FOREHEAD]
    for image, hair in ((picture, HAIR_RGB), (truth, HAIR)):
        cv2.ellipse(image, (round(float(top[0])), round(float(top[1])) + 32), (39, 50), 0, 180, 360, hair, -1)
    oval = mesh.fill(points[list(mesh.OVAL)], SIDE, SIDE).astype(bool)
    picture[oval], truth[oval] = SKIN_RGB, SKIN
    noise = np.random.default_rng(0).normal(0, 4, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8), truth


def data_set(root, pictures, points, found=None) -> DatasetFolder:
    folder = DatasetFolder(root)
    for i, picture in enumerate(pictures):
        write_rgb(folder.frame(i), picture, 97)
    found = np.ones(len(pictures), bool) if found is None else np.array(found)
    dense = np.concatenate([np.array(points, np.float32), np.zeros((len(pictures), 478, 1), np.float32)], 2)
    dense[~found] = np.nan
    write_npz(folder.face_landmarks, found=found, points=dense)
    return folder


def true_person(truth: np.ndarray):
    """Stands in for the person network: the true silhouette, blurred as the network's is."""
    return lambda rgb: cv2.GaussianBlur((truth != BACKGROUND).astype(np.float32), (0, 0), 2)


def iou(a: np.ndarray, b: np.ndarray, labels) -> float:
    a, b = np.isin(a, labels), np.isin(b, labels)
    return (a & b).sum() / (a | b).sum()


def test_regions_of_a_drawn_portrait_are_found_and_a_suit_as_dark_as_the_hair_is_cloth(tmp_path):
    points = face_mesh()
    picture, truth = portrait(points)
    parser = FrameParser(Clip(data_set(tmp_path, [picture] * 3, [points] * 3)), true_person(truth))
    _, classes = parser.parse(1)
    assert classes.dtype == np.uint8 and classes.max() <= 18
    for labels, least in ((HEAD_CLASSES, 0.93), ((HAIR,), 0.85), ((NECK,), 0.8), ((CLOTH,), 0.93)):
        assert iou(classes, truth, labels) > least, labels
    assert (classes[truth == CLOTH] == HAIR).mean() < 0.01
    assert (classes == MOUTH).any() and (classes == mesh.NOSE).any() and (classes == mesh.LEFT_EYE).any()


def test_the_chin_follows_the_opening_jaw(tmp_path):
    closed, opened = face_mesh(), face_mesh(jaw=8.0)
    meshes = [closed] * 5 + [opened] * 5
    pictures = [portrait(p)[0] for p in meshes]
    truth = portrait(opened)[1]
    parser = FrameParser(Clip(data_set(tmp_path, pictures, meshes)), true_person(truth))
    chin = [np.flatnonzero(np.isin(parser.parse(i)[1][:, 96], HEAD_CLASSES)).max() for i in (1, 8)]
    assert chin[1] - chin[0] == pytest.approx(8, abs=1)


def test_a_still_head_in_camera_noise_has_a_still_mask(tmp_path):
    points = face_mesh()
    picture, truth = portrait(points)
    rng = np.random.default_rng(1)
    noisy = [np.clip(picture + rng.normal(0, 3, picture.shape), 0, 255).astype(np.uint8) for _ in range(6)]
    parser = FrameParser(Clip(data_set(tmp_path, noisy, [points] * 6)), true_person(truth))
    masks = [parser.parse(i)[1] for i in range(6)]
    outline = cv2.morphologyEx(np.isin(truth, HEAD_CLASSES).astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)).sum()
    for a, b in zip(masks, masks[1:], strict=False):
        assert (np.isin(a, HEAD_CLASSES) ^ np.isin(b, HEAD_CLASSES)).sum() < 0.03 * outline


def test_identical_frames_give_identical_masks_whatever_was_parsed_before(tmp_path):
    points = face_mesh()
    picture, truth = portrait(points)
    clip = Clip(data_set(tmp_path, [picture] * 8, [points] * 8))
    in_order = dict(ordered_map(FrameParser(clip, true_person(truth)).parse, range(8), workers=2))
    alone = FrameParser(clip, true_person(truth)).parse(5)[1]
    assert all(np.array_equal(in_order[i], alone) for i in range(8))


def test_frames_without_a_face_are_skipped_and_finished_ones_kept(tmp_path, monkeypatch):
    points = face_mesh()
    picture, truth = portrait(points)
    folder = data_set(tmp_path, [picture] * 4, [points] * 4, found=[True, False, True, True])

    class Silhouette:
        def __enter__(self):
            return true_person(truth)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("data_utils.face_parsing.embedded.PersonMask", Silhouette)
    options = argparse.Namespace(parsing="mediapipe", force=False)
    facts = face_parsing.run(folder, options)
    assert facts["backend"] == "mediapipe" and facts["frames"] == facts["parsed_now"] == 3
    assert sorted(p.name for p in folder.parsing(0).parent.iterdir()) == ["0.png", "2.png", "3.png"]
    before = read_parsing(folder.parsing(2))
    folder.parsing(2).write_bytes(folder.parsing(2).read_bytes()[:-20])  # as a full disk would leave it
    assert face_parsing.run(folder, options)["parsed_now"] == 1
    assert np.array_equal(read_parsing(folder.parsing(2)), before)
    assert face_parsing.run(folder, argparse.Namespace(parsing="mediapipe", force=True))["parsed_now"] == 3


def test_an_unknown_or_unavailable_back_end_is_refused_by_name(monkeypatch):
    with pytest.raises(UserError, match="segnet.*bisenetv2, mediapipe"):
        face_parsing.choose("segnet")
    monkeypatch.setattr(face_parsing.BiSeNetV2, "available", lambda self: False)
    with pytest.raises(UserError, match="bisenetv2 cannot run.*ai-edge-litert"):
        face_parsing.choose("bisenetv2")
    assert face_parsing.choose("auto").name == "mediapipe"


def test_a_clip_without_any_face_is_refused(tmp_path):
    folder = data_set(tmp_path, [np.zeros((8, 8, 3), np.uint8)], np.zeros((1, 478, 2)), found=[False])
    with pytest.raises(UserError, match="no frame with a face"):
        Clip(folder)


def test_guided_upsampling_moves_a_blurred_edge_onto_the_pictures_edge():
    full = np.zeros((128, 128, 3), np.float32)
    full[:, 61:] = (0.8, 0.2, 0.3)
    small = cv2.resize(full, (64, 64), interpolation=cv2.INTER_AREA)
    ramp = np.tile(np.clip((np.arange(64, dtype=np.float32) - 27) / 6, 0, 1), (64, 1))  # soft, and a pixel off
    out = guided_upsample(ramp[None], small, full, 4, 1e-4)[0]
    assert out.shape == (128, 128)
    assert out[64, 59] < 0.3 and out[64, 62] > 0.7
    flat = np.full((1, 64, 64), 0.37, np.float32)
    np.testing.assert_allclose(guided_upsample(flat, small, full, 4, 1e-4), 0.37, atol=1e-3)


def test_averaging_over_time_acts_on_still_pixels_only():
    still, moved = np.zeros((16, 16, 3), np.float32), np.ones((16, 16, 3), np.float32)
    masks = [np.full((1, 16, 16), value, np.float32) for value in (0.0, 1.0, 0.5)]
    assert average_over_time([still] * 3, masks, 1)[0, 8, 8] == pytest.approx(0.5)
    assert average_over_time([moved, still, moved], masks, 1)[0, 8, 8] == pytest.approx(1.0)


def test_landmark_smoothing_keeps_a_steady_motion_and_the_gaps():
    steady = face_mesh()[None] + np.arange(20, dtype=np.float32)[:, None, None]
    steady[7] = np.nan
    smooth = mesh.smooth_landmarks(steady)
    np.testing.assert_allclose(smooth, steady, atol=1e-3)


def test_head_coordinates_follow_shift_turn_and_size_but_not_the_jaw():
    base = face_mesh()
    head = mesh.HeadFrame(base[None])
    a, b = head.to_pixels(base)
    turn = 1.3 * np.exp(0.2j)
    z = (base[:, 0] + 1j * base[:, 1]) * turn + (5 - 3j)
    moved = head.to_pixels(np.stack([z.real, z.imag], 1))
    assert moved[0] == pytest.approx(a * turn, rel=1e-3) and moved[1] == pytest.approx(b * turn + (5 - 3j), abs=0.05)
    corner = (base[454, 0] + 1j * base[454, 1] - b) / a
    opened = face_mesh(jaw=8.0)
    a, b = head.to_pixels(opened)
    assert abs((opened[454, 0] + 1j * opened[454, 1] - b) / a - corner) < 0.02


def steady(pictures, maps, todo=None):
    ids = list(range(len(maps))) if todo is None else todo
    needed = with_neighbours(ids, np.ones(len(maps), bool))
    result = list(steadied(((i, pictures[i], maps[i]) for i in needed), ids))
    assert [i for i, _ in result] == ids
    return [classes for _, classes in result]


def test_a_class_that_flickers_on_a_still_head_is_steady():
    random = np.random.default_rng(0)
    still = cv2.GaussianBlur(random.integers(0, 255, (64, 64, 3), dtype=np.uint8), (0, 0), 3)
    pictures = [np.clip(still.astype(int) + random.normal(0, 3, still.shape), 0, 255).astype(np.uint8) for _ in range(12)]
    truth = np.where(np.arange(64) < 32, SKIN, HAIR).astype(np.uint8)[None].repeat(64, 0)
    maps = [truth.copy() for _ in range(12)]
    for i in (0, 4, 7, 11):
        maps[i][random.random((64, 64)) < 0.2] = NECK
    assert all((classes == truth).all() for classes in steady(pictures, maps))


@pytest.mark.parametrize("contrast", [120, 0])
def test_a_moving_edge_of_classes_does_not_lag(contrast):
    """Nor where head and background have one colour, for as many frames before as after have a vote."""
    maps = [np.where(np.arange(64) < 10 + 3 * i, SKIN, BACKGROUND).astype(np.uint8)[None].repeat(64, 0) for i in range(12)]
    pictures = [np.where(m == SKIN, 60 + contrast, 60).astype(np.uint8)[..., None].repeat(3, 2) for m in maps]
    for i, classes in enumerate(steady(pictures, maps)):
        if contrast or 2 <= i < 10:
            np.testing.assert_array_equal(classes, maps[i])


def test_steadied_classes_do_not_depend_on_which_frames_are_left_to_do():
    random = np.random.default_rng(0)
    maps, pictures = random.integers(0, 3, (9, 16, 16), dtype=np.uint8), np.full((9, 16, 16, 3), 80, np.uint8)
    whole = steady(pictures, maps)
    for todo in ([3], [0, 1, 7], [4, 5, 6, 7, 8]):
        np.testing.assert_array_equal(steady(pictures, maps, todo), [whole[i] for i in todo])


def test_labels_beyond_the_head_crop_come_from_the_person_mask():
    points = face_mesh()
    to_crop = crop_transform(points, 64)
    person = np.ones((400, 400), np.float32)
    classes = paste(np.full((64, 64), SKIN, np.uint8), to_crop, person, points)
    assert classes[80, 96] == SKIN and classes[390, 200] == CLOTH and classes[10, 390] == HAIR
    assert paste(np.full((64, 64), SKIN, np.uint8), to_crop, 0 * person, points)[390, 200] == BACKGROUND


def test_truncated_files_are_not_whole(tmp_path):
    for name in ("a.jpg", "a.png"):
        path = tmp_path / name
        assert not is_whole(path)
        write_rgb(path, np.zeros((9, 9, 3), np.uint8))
        assert is_whole(path)
        path.write_bytes(path.read_bytes()[:-1])
        assert not is_whole(path)


def test_the_synthetic_heads_masks_agree_with_its_truth(tmp_path):
    if not (model_store.find("selfie_segmentation") and model_store.find("face_landmarker")):
        pytest.skip("needs selfie_segmentation and face_landmarker: python -m utils.model_store fetch all")
    from data_utils.demo_head.clip import make_clip
    from data_utils.landmarks import FaceLandmarker

    make_clip(tmp_path, seconds=1.0, size=192, seed=5)
    frames = list(read_frames(tmp_path / "demo.mp4"))
    with FaceLandmarker(video=True) as landmarker:
        points = [landmarker.detect(frame)[0].points[:, :2] for frame in frames]
    folder = data_set(tmp_path, frames, points)
    face_parsing.run(folder, argparse.Namespace(parsing="mediapipe", force=False))
    some = range(0, len(frames), 4)
    pairs = [(read_parsing(folder.parsing(i)), read_parsing(tmp_path / "truth" / "masks" / f"{i}.png")) for i in some]
    assert read_rgb(folder.frame(0)).shape[:2] == pairs[0][0].shape
    for labels, least in ((HEAD_CLASSES, 0.95), ((HAIR,), 0.85), ((NECK,), 0.85), ((CLOTH,), 0.92)):
        assert np.median([iou(a, b, labels) for a, b in pairs]) > least, labels
