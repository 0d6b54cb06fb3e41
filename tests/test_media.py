"""Pictures, audio and video survive the trip to disk and back."""

import av
import cv2
import numpy as np
import pytest

from utils import encoders
from utils.audio import load_audio, save_wav
from utils.constants import CLOTH, FPS, NECK, SAMPLE_RATE, SAMPLES_PER_FRAME
from utils.errors import UserError
from utils.image import nearest, read_parsing, read_rgb, read_rgba, write_parsing, write_rgb
from utils.video import VideoWriter, probe, read_frames


def clip(path, frames=50, size=64, audio=True, **options):
    """A clip whose grey level is the frame number, with a click on each tenth frame."""
    samples = np.zeros(frames * SAMPLES_PER_FRAME, np.float32)
    samples[:: 10 * SAMPLES_PER_FRAME] = 0.9
    with VideoWriter(path, size, size, audio=samples if audio else None, **options) as writer:
        for i in range(frames):
            writer.add(np.full((size, size, 3), 4 * i, np.uint8))
    return path


def test_a_lossless_video_decodes_to_the_frames_that_were_written(tmp_path):
    path = clip(tmp_path / "名前 with space.mp4", lossless=True)
    levels = [frame[0, 0, 0] for frame in read_frames(path)]
    assert levels == [4 * i for i in range(50)]


COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (220, 170, 150), (128, 128, 128), (10, 20, 30), (255, 255, 255))


@pytest.mark.parametrize("name", ["a.mp4", "b.mp4", "sketch.mp4", "alpha.mov"])
def test_a_video_says_that_its_colours_are_bt709_and_they_come_back(tmp_path, name):
    kind = {"alpha": name == "alpha.mov", "sketch": 2 if name == "sketch.mp4" else 0}
    codec = encoders.codec("libx265" if name == "b.mp4" else "libx264", 8, **kind)
    bars = np.concatenate([np.full((64, 32, 3), colour, np.uint8) for colour in COLOURS], 1)
    frame = np.dstack([bars, np.full(bars.shape[:2], 255, np.uint8)]) if name == "alpha.mov" else bars
    with VideoWriter(tmp_path / name, bars.shape[1], 64, codec=codec) as writer:
        writer.add(frame)
    with av.open(str(tmp_path / name)) as container:
        seen = next(container.decode(video=0))
    assert (seen.colorspace, seen.color_primaries, seen.color_trc, seen.color_range) == (1, 1, 1, 1)  # BT.709, limited
    depth = seen.format.components[0].bits
    luma = np.frombuffer(seen.planes[0], np.uint8 if depth == 8 else np.uint16).reshape(64, -1)[32, 16 : bars.shape[1] : 32]
    wanted = 16 + 219 / 255 * (np.array(COLOURS) @ (0.2126, 0.7152, 0.0722))
    assert np.abs(luma / 2.0 ** (depth - 8) - wanted).max() < 1.5  # stored as it is said, too
    (back,) = read_frames(tmp_path / name)
    assert np.abs(back[32, 16::32].astype(int) - COLOURS).max() <= 2


def test_reading_and_writing_make_a_picture_neither_darker_nor_of_another_hue(tmp_path):
    picture = np.random.default_rng(0).normal(128, 300, (64, 64, 3))
    picture = np.clip(cv2.GaussianBlur(picture, (0, 0), 6), 0, 255).astype(np.uint8)
    with VideoWriter(tmp_path / "a.mp4", 64, 64, crf=1) as writer:
        writer.add(picture)
    (back,) = read_frames(tmp_path / "a.mp4")
    assert np.abs((back.astype(float) - picture).mean((0, 1))).max() < 0.3  # FFmpeg's fast ways: 1.4


@pytest.mark.parametrize("frames", [1, 2])
def test_the_shortest_videos_are_written_by_x265(tmp_path, frames):
    """x265 says nothing of the decoding times of one or two pictures; which ones they had was chance."""
    for attempt in range(8):
        with VideoWriter(tmp_path / f"{attempt}.mp4", 64, 64, codec=encoders.codec("libx265")) as writer:
            for _ in range(frames):
                writer.add(np.full((64, 64, 3), 99, np.uint8))
        assert len(list(read_frames(tmp_path / f"{attempt}.mp4"))) == frames


def test_a_lossless_video_is_not_said_to_be_yuv(tmp_path):
    with av.open(str(clip(tmp_path / "a.mp4", frames=2, lossless=True))) as container:
        assert next(container.decode(video=0)).colorspace != 1


def test_audio_in_a_video_stays_in_step_with_its_frames(tmp_path):
    samples = load_audio(clip(tmp_path / "a.mp4"))
    clicks = np.flatnonzero(np.abs(samples) > 0.3)
    starts = clicks[np.insert(np.diff(clicks) > 1000, 0, True)]
    assert np.abs(starts - np.arange(5) * 10 * SAMPLES_PER_FRAME).max() < SAMPLES_PER_FRAME // 4
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.fps, info.has_audio) == (64, 64, FPS, True)


def test_frames_are_read_at_25_a_second_from_any_rate(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.video.FPS", 50)
    path = clip(tmp_path / "fast.mp4", audio=False, lossless=True)
    monkeypatch.undo()
    levels = np.array([int(frame[0, 0, 0]) for frame in read_frames(path, fps=FPS)])
    assert len(levels) in (25, 26) and set(np.diff(levels[:-1])) <= {4, 8, 12} and abs(levels[20] - 160) <= 4


def test_a_wav_round_trip_is_exact_to_16_bit(tmp_path):
    samples = np.sin(np.arange(SAMPLE_RATE) / 20).astype(np.float32) * 0.5
    save_wav(tmp_path / "a.wav", samples)
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), samples, atol=1 / 32000)


def test_pictures_and_class_maps_survive_in_folders_of_any_language(tmp_path):
    folder = tmp_path / "数据 集"
    image = np.random.default_rng(0).integers(0, 255, (32, 48, 4), np.uint8)
    write_rgb(folder / "a.png", image)
    np.testing.assert_array_equal(read_rgba(folder / "a.png"), image)
    write_rgb(folder / "b.jpg", np.full((32, 48, 3), (200, 30, 40), np.uint8))
    assert np.abs(read_rgb(folder / "b.jpg").astype(int) - (200, 30, 40)).max() < 4
    classes = np.arange(19, dtype=np.uint8).repeat(10).reshape(19, 10)
    write_parsing(folder / "p.png", classes)
    np.testing.assert_array_equal(read_parsing(folder / "p.png"), classes)


def test_an_opencv_reader_sees_the_lineages_colours_in_a_class_map(tmp_path):
    import cv2

    write_parsing(tmp_path / "p.png", np.array([[1, NECK, CLOTH, 0, 17]], np.uint8))
    seen = cv2.imread(str(tmp_path / "p.png"))[0].tolist()
    assert seen == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [255, 0, 0]]
    cv2.imwrite(str(tmp_path / "old.png"), np.array([seen], np.uint8))  # and a three-colour file of the lineage reads here
    assert read_parsing(tmp_path / "old.png").tolist() == [[1, NECK, CLOTH, 0, 1]]


@pytest.mark.parametrize("read", [probe, load_audio])
def test_absent_and_broken_media_are_refused_by_name(tmp_path, read):
    with pytest.raises(UserError, match="none.mp4"):
        read(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("this is no video")
    with pytest.raises(UserError, match="text.mp4"):
        read(tmp_path / "text.mp4")


def test_an_interrupted_video_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "half.mp4", 64, 64) as writer:
        writer.add(np.zeros((64, 64, 3), np.uint8))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_known_pixel_is_one_of_the_known_and_hardly_farther_than_any_other():
    known = np.random.default_rng(0).random((40, 60)) < 0.02
    index, distance = nearest(known)
    pixels = np.indices(known.shape).reshape(2, -1).T
    true = np.linalg.norm(pixels[:, None] - np.argwhere(known)[None], axis=2).min(1)
    found = np.linalg.norm(pixels - pixels[index.ravel()], axis=1)
    assert known.ravel()[index].all()
    np.testing.assert_allclose(found, true, rtol=0.05)
    np.testing.assert_allclose(distance.ravel(), true, rtol=0.05)
    assert (nearest(np.zeros((4, 5), bool))[0] == 0).all()
