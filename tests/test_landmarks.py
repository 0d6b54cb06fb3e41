"""The 68 landmarks, which frames are usable, and the expression scores."""

import argparse
import sys
import types
import urllib.error

import numpy as np
import pytest

from data_utils import blendshape_capture, landmarks
from data_utils.landmarks import IBUG_68, read_dense, to_68, unusable_frames
from utils.constants import BLINK_COLUMNS, JAW_OPEN_COLUMN, UPPER_FACE_COLUMNS
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import read_json, read_npy, write_npz
from utils.image import write_rgb

SIDE = 200


def synthetic(frames=60):
    """Marks (F, 68, 2), found, points (F, 478, 3), faces of a face 100 px high that sways by a few pixels."""
    rng = np.random.default_rng(0)
    face = np.column_stack([rng.uniform(60, 140, 478), np.linspace(50, 150, 478), rng.uniform(-10, 10, 478)])
    sway = 4 * np.sin(np.arange(frames) / 8)[:, None, None] + rng.normal(0, 0.2, (frames, 1, 1))
    points = (face + sway * np.array([1.0, 0.3, 0.0])).astype(np.float32)
    return to_68(points), np.ones(frames, bool), points, np.ones(frames, np.uint8)


def data_set(root, points, found, faces, scores=None):
    folder = DatasetFolder(root)
    if scores is None:
        scores = np.where(found[:, None], 0.1, np.nan) * np.ones((1, 52))
    write_npz(folder.face_landmarks, found=found, points=points, faces=faces, blendshapes=scores.astype(np.float32))
    write_rgb(folder.frame(0), np.zeros((SIDE, SIDE, 3), np.uint8))
    return folder


def options(**changes):
    return argparse.Namespace(video="clip.mp4", landmarks="auto", blendshapes="auto", force=False, device="cpu", **changes)


def test_the_68_points_are_where_the_synthetic_head_has_them(processed):
    folder, truth = processed
    marks = to_68(read_dense(folder)["points"])
    expected = truth["landmarks68"]
    height = np.ptp(expected[..., 1], axis=1).mean()
    error = np.linalg.norm(marks - expected, axis=-1).mean(0) / height
    assert error[17:].mean() < 0.05 and error.max() < 0.15  # brows, eyes, nose and lips; the jaw line is soft


def test_lms_files_hold_68_rows_of_pixels_as_older_tools_read_them(processed):
    folder, _ = processed
    text = folder.landmarks(3).read_text()
    assert text.splitlines()[0].count(" ") == 1 and "." in text
    np.testing.assert_allclose(np.loadtxt(folder.landmarks(3)), to_68(read_dense(folder)["points"][3]), atol=1e-5)


def test_the_index_table_is_left_right_symmetric_on_a_face(processed):
    folder, _ = processed
    points = read_dense(folder)["points"].mean(0)
    middle = points[[10, 152, 168, 2], 0].mean()
    mirror = {0: 16, 4: 12, 7: 9, 17: 26, 21: 22, 31: 35, 36: 45, 39: 42, 37: 44, 48: 54, 49: 53, 59: 55, 60: 64, 67: 65}
    for left, right in mirror.items():
        a, b = points[IBUG_68[left]], points[IBUG_68[right]]
        assert a[0] < middle < b[0] and abs((middle - a[0]) - (b[0] - middle)) < 0.12 * np.ptp(points[:, 0])


def test_a_clean_clip_keeps_every_frame():
    marks, found, points, faces = synthetic()
    assert unusable_frames(marks, found, points, faces, SIDE, SIDE) == {}


@pytest.mark.parametrize("reason", ["no face", "several faces", "face cut by the frame", "face too small", "landmarks jump"])
def test_a_bad_frame_is_dropped_with_its_reason(reason):
    marks, found, points, faces = synthetic()
    i = 20
    if reason == "no face":
        found[i], points[i] = False, np.nan
    elif reason == "several faces":
        faces[i] = 2
    elif reason == "face cut by the frame":
        points[i, :, 1] += 80
    elif reason == "face too small":
        points[i] *= 0.2
    else:
        points[i, :, 0] += 12
    assert unusable_frames(to_68(points), found, points, faces, SIDE, SIDE) == {i: reason}


def test_frames_keep_their_ids_when_some_are_dropped(tmp_path):
    _, found, points, faces = synthetic(100)
    found[[0, 40, 41]] = False
    points[[0, 40, 41]] = np.nan
    folder = data_set(tmp_path, points, found, faces)
    facts = landmarks.run(folder, options())
    valid = read_json(folder.valid)
    assert valid["valid"] == [i for i in range(100) if i not in (0, 40, 41)]
    assert valid["dropped"] == {"0": "no face", "40": "no face", "41": "no face"}
    assert facts["valid"] == 97 and not folder.landmarks(40).exists() and folder.landmarks(42).exists()


def test_too_few_usable_frames_are_refused_with_the_reasons_counted(tmp_path):
    _, found, points, faces = synthetic(100)
    found[:30], points[:30], faces[30:50] = False, np.nan, 2
    folder = data_set(tmp_path, points, found, faces)
    with pytest.raises(UserError, match=r"only 50 of 100 frames are usable \(no face: 30, several faces: 20\)"):
        landmarks.run(folder, options())
    assert not folder.valid.exists() and not list(tmp_path.glob("ori_imgs/*.lms"))
    forced = options()
    forced.force = True
    assert landmarks.run(folder, forced)["valid"] == 50


def test_an_unknown_back_end_is_refused_with_the_known_ones(tmp_path):
    folder = data_set(tmp_path, *synthetic()[2:0:-1], synthetic()[3])
    bad = options()
    bad.landmarks = "dlib"
    with pytest.raises(UserError, match="--landmarks dlib is not known; there are auto, mediapipe, fan"):
        landmarks.run(folder, bad)


def test_fan_without_its_weights_and_a_network_ends_in_one_sentence(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    package = types.SimpleNamespace(FaceAlignment=unreachable, LandmarksType=types.SimpleNamespace(TWO_D=1))
    monkeypatch.setitem(sys.modules, "face_alignment", package)
    write_npz(DatasetFolder(tmp_path).face_landmarks, found=np.ones(3, bool), points=np.zeros((3, 478, 3), np.float32))
    with pytest.raises(UserError, match="--landmarks fan could not get its weights .*no route to host.*--landmarks mediapipe"):
        landmarks.FanLandmarks().run(DatasetFolder(tmp_path), argparse.Namespace(device="cpu"))


def test_blendshapes_are_arkit_ordered_smooth_and_filled_where_no_face_was(tmp_path):
    _, found, points, faces = synthetic(80)
    scores = np.zeros((80, 52))
    scores[:, 0] = 0.9  # _neutral goes
    scores[:, 1 + JAW_OPEN_COLUMN] = np.linspace(0, 0.79, 80)  # MediaPipe's jawOpen is column 25
    scores[:, 1 + BLINK_COLUMNS[0]] = np.arange(80) % 10 == 0
    found[30:35] = False
    scores[30:35] = np.nan
    folder = data_set(tmp_path, points, found, faces, scores)
    facts = blendshape_capture.run(folder, options())
    rows = read_npy(folder.blendshapes)
    assert rows.shape == (80, 52) and rows.dtype == np.float32 and rows.min() >= 0 and rows.max() <= 1
    np.testing.assert_allclose(rows[:, JAW_OPEN_COLUMN], np.linspace(0, 0.79, 80), atol=1e-6)  # a line stays, also in the gap
    assert (rows[:, 51] == 0).all() and facts["interpolated"] == 5 and facts["warnings"] == []


def test_eyes_that_never_move_are_warned_of(tmp_path):
    _, found, points, faces = synthetic()
    facts = blendshape_capture.run(data_set(tmp_path, points, found, faces), options())
    assert "blink" in facts["warnings"][0]


def test_the_mouth_and_eyes_of_the_synthetic_head_move_its_blendshapes(processed):
    folder, truth = processed
    rows = read_npy(folder.blendshapes)
    assert np.corrcoef(rows[:, JAW_OPEN_COLUMN], truth["lip_opening"])[0, 1] > 0.7
    assert np.corrcoef(rows[:, BLINK_COLUMNS].mean(1), truth["blink"])[0, 1] > 0.7


def test_geometric_blendshapes_follow_the_learned_ones(processed):
    folder, _ = processed
    dense = read_dense(folder)
    learned = blendshape_capture.BACKENDS["mediapipe"].run(dense)
    ratio = blendshape_capture.BACKENDS["geometric"].run(dense)
    for column in (*BLINK_COLUMNS, JAW_OPEN_COLUMN):
        assert np.corrcoef(learned[:, column], ratio[:, column])[0, 1] > 0.7
    assert ratio.shape == (len(learned), 52) and ratio.min() >= 0 and ratio.max() <= 1


def test_geometric_blendshapes_of_real_faces_are_close_to_the_learned_ones(shared):
    from itertools import islice

    from utils.video import read_frames

    points, scores = [], []
    with landmarks.FaceLandmarker(video=True) as landmarker:
        for image in islice(read_frames(shared / "videos" / "dfrf_cnn2_25fps.mp4"), 75):
            face = landmarker.detect(image)[0]
            points.append(face.points)
            scores.append(face.blendshapes)
    dense = {"points": np.array(points), "blendshapes": np.array(scores)}
    learned, ratio = (blendshape_capture.BACKENDS[name].run(dense)[:, UPPER_FACE_COLUMNS] for name in ("mediapipe", "geometric"))
    assert np.abs(learned - ratio).mean() < 0.15


def test_smoothing_blendshapes_adds_no_lag():
    time = np.arange(100)
    for period in (10, 16, 40):
        curve = 0.5 + 0.4 * np.sin(2 * np.pi * time / period)
        smoothed = blendshape_capture.smooth(np.repeat(curve[:, None], 52, 1))[:, 0]
        shifts = [np.corrcoef(smoothed[10:90], np.roll(curve, shift)[10:90])[0, 1] for shift in (-1, 0, 1)]
        assert int(np.argmax(shifts)) == 1 and abs(shifts[0] - shifts[2]) < 1e-3, period
