"""The quality check says what will go wrong before anything expensive runs, and the window around the head."""

import numpy as np
import pytest

from data_utils.crop import head_window
from data_utils.landmarks import Face
from data_utils.quality import Inspection, check, inspect, judge_scene, split_main
from utils.audio import load_audio
from utils.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from utils.errors import UserError
from utils.video import VideoWriter, read_frames


def write_clip(path, frames, audio=None):
    frames = list(frames)
    height, width = frames[0].shape[:2]
    with VideoWriter(path, width, height, audio=audio) as writer:
        for frame in frames:
            writer.add(frame)
    return path


def tone(frames, level=0.2):
    return (level * np.sin(np.arange(frames * SAMPLES_PER_FRAME) / 20)).astype(np.float32)


def landscape(width=160, height=96):
    """Sky, hills and a field: no face in it."""
    y, x = np.mgrid[:height, :width]
    hills = height * (0.5 + 0.1 * np.sin(x / 17) + 0.05 * np.sin(x / 5))
    picture = np.where((y < hills)[..., None], (110, 160, 230), (60, 120, 50)).astype(np.uint8)
    return np.ascontiguousarray(picture)


def test_a_good_clip_passes_and_its_shortness_is_warned_of(demo_clip):
    result = inspect(demo_clip, 192, 1.0)
    assert result.fatal == [] and result.problems == []
    assert any("only 4 s long" in warning for warning in result.warnings)
    assert result.facts["frames_with_face"] == result.facts["samples"] and result.facts["cuts"] == 0


def test_a_clip_without_a_face_is_refused(tmp_path):
    clip = write_clip(tmp_path / "hills.mp4", [landscape()] * 110, tone(110))
    with pytest.raises(UserError, match=r"hills\.mp4 .*no face is seen in any of 48 sampled frames"):
        check(clip, 128, 1.0, force=True)


def test_a_clip_without_sound_is_refused_even_if_forced(tmp_path, demo_clip):
    clip = write_clip(tmp_path / "mute.mp4", read_frames(demo_clip))
    with pytest.raises(UserError, match="no audio track"):
        check(clip, 192, 1.0, force=True)


def test_a_silent_sound_track_is_refused_unless_forced(tmp_path, demo_clip):
    frames = list(read_frames(demo_clip))
    clip = write_clip(tmp_path / "silent.mp4", frames, tone(len(frames), 0.0))
    with pytest.raises(UserError, match="silent .*--force"):
        check(clip, 192, 1.0, force=False)
    assert any("silent" in warning for warning in check(clip, 192, 1.0, force=True).warnings)


def test_a_two_second_clip_is_refused(tmp_path, demo_clip):
    frames = list(read_frames(demo_clip))[:50]
    clip = write_clip(tmp_path / "short.mp4", frames, tone(50))
    with pytest.raises(UserError, match=r"short\.mp4 .*only 2\.0 s long"):
        check(clip, 192, 1.0, force=False)


def test_two_people_are_refused_unless_forced(tmp_path, demo_clip):
    frames = list(read_frames(demo_clip))
    pairs = [np.hstack([frame, frame[:, ::-1]]) for frame in frames]
    clip = write_clip(tmp_path / "two.mp4", pairs, load_audio(demo_clip))
    with pytest.raises(UserError, match="two faces of like size .*--force"):
        check(clip, 192, 1.0, force=False)
    crop = check(clip, 192, 1.0, force=True).facts["crop"]
    assert crop["side"] <= 192  # one of them is kept to


def test_a_face_in_half_of_the_frames_is_refused_with_counts(tmp_path, demo_clip):
    frames = list(read_frames(demo_clip))
    empty = np.zeros_like(frames[0]) + 90
    clip = write_clip(tmp_path / "half.mp4", [*frames[:55], *[empty] * 55], load_audio(demo_clip))
    with pytest.raises(UserError, match=r"a face is seen in only \d\d of 48 sampled frames"):
        check(clip, 192, 1.0, force=False)


def test_a_person_far_off_in_a_tall_picture_is_found_and_framed(shared):
    facts = check(shared / "videos" / "latentsync_demo1.mp4", 512, 1.0, force=False).facts
    crop, boxes = facts["crop"], np.array(facts["face_boxes"])
    assert (facts["width"], facts["height"]) == (1080, 1920) and facts["frames_with_face"] >= 45
    assert 400 < crop["side"] < 800
    assert (boxes[:, :2] > (crop["x"], crop["y"])).all() and (boxes[:, 2:] < np.add((crop["x"], crop["y"]), crop["side"])).all()


def face(x, y, height):
    points = np.zeros((478, 3), np.float32)
    points[:, 0], points[:, 1] = x, np.linspace(y - height / 2, y + height / 2, 478)
    return Face(points, np.zeros(52, np.float32), np.eye(4))


def test_the_main_face_is_the_one_the_clip_is_about():
    people = [[face(100, 100, 80), face(400, 120, 30)] for _ in range(9)] + [[face(420, 130, 160)]] + [[]]
    mains, others = split_main(people)
    assert [main is not None and main.centre[0] == 100 for main in mains] == [True] * 9 + [False, False]
    assert [len(rest) for rest in others] == [1] * 10 + [0]


def scenes(shift_a_frame=0.0, cut=False):
    rng = np.random.default_rng(0)
    import cv2

    wide = cv2.GaussianBlur(rng.integers(0, 255, (240, 900), np.uint8), (0, 0), 3) * np.uint8(3)
    other = cv2.GaussianBlur(rng.integers(0, 255, (240, 900), np.uint8), (0, 0), 3) * np.uint8(3)
    return [(other if cut and k >= 6 else wide)[:, (left := int(k * shift_a_frame)) : left + 320].copy() for k in range(12)]


@pytest.mark.parametrize("case", ["still", "moving", "cut"])
def test_a_moving_camera_is_warned_of_and_a_cut_refused(case):
    result = Inspection({})
    pictures = scenes(4.0 if case == "moving" else 0.0, case == "cut")
    judge_scene(result, pictures, [[face(160, 90, 60)]] * len(pictures), 320)
    assert ["cut"] * len(result.problems) == (["cut"] if case == "cut" else [])
    assert len(result.warnings) == (case == "moving")


BOXES = np.array([[500.0, 200.0, 620.0, 360.0]] * 10)


def test_the_window_holds_hair_neck_and_shoulders_and_grows_with_scale():
    plain, wide = (head_window(BOXES, 1280, 720, 512, scale) for scale in (1.0, 1.2))
    assert plain.side == 328 and wide.side == 394  # 0.45 + 1 + 0.60 face heights of 160
    for crop in (plain, wide):
        assert crop.y < 200 - 0.4 * 160 and crop.y + crop.side > 360 + 0.5 * 160
        assert abs(crop.x + crop.side / 2 - 560) <= 1
    np.testing.assert_allclose(wide.y + wide.side / 2, plain.y + plain.side / 2, atol=1)


def test_a_window_at_the_edge_is_moved_not_shrunk():
    crop = head_window(BOXES - (490, 190, 490, 190), 1280, 720, 512)
    assert (crop.x, crop.y, crop.side) == (0, 0, 328)


def test_a_moving_head_stays_in_the_window():
    boxes = BOXES + np.linspace(-80, 80, 10)[:, None] * (1, 0, 1, 0)
    crop = head_window(boxes, 1280, 720, 512)
    assert crop.x < boxes[:, 0].min() - 20 and crop.x + crop.side > boxes[:, 2].max() + 20


def test_a_clip_of_the_right_size_is_left_alone_and_a_square_one_only_resized():
    boxes = np.array([[180.0, 150.0, 330.0, 400.0]] * 4)
    assert head_window(boxes, 512, 512, 512, 1.2).side == 512
    assert (head_window(boxes, 512, 512, 256).x, head_window(boxes, 512, 512, 256).side) == (0, 512)
    assert head_window(boxes / 4, 512, 512, 256).side < 200  # a small head in a square picture is cropped


def test_the_crop_maps_back_onto_the_source():
    crop = head_window(BOXES, 1280, 720, 512)
    image = np.zeros((720, 1280, 3), np.uint8)
    image[280:284, 558:562] = 255
    frame = crop.resize(crop.cut(image))
    y, x = (np.argwhere(frame[..., 0] > 127) + 0.5).mean(0)
    assert frame.shape == (512, 512, 3)
    np.testing.assert_allclose([crop.x + x * crop.side / crop.size, crop.y + y * crop.side / crop.size], [560, 282], atol=0.3)


def test_clipped_sound_is_warned_of(tmp_path):
    loud = np.clip(tone(110, 4.0), -1, 1)
    import soundfile

    soundfile.write(tmp_path / "loud.wav", loud, SAMPLE_RATE)
    from data_utils.quality import judge_audio

    result = Inspection({})
    judge_audio(result, tmp_path / "loud.wav", True)
    assert any("clipped" in warning for warning in result.warnings)
