"""What lies behind the head: the filmed frame, the whole source video, another background, or nothing at all."""

import json
import types

import av
import cv2
import numpy as np
import pytest
import torch
from test_render import SMALL, dataset, failure, model, speak, speech_features, trained  # noqa: F401  fixtures
from tiny_dataset import write_tiny_dataset

import render
from gaussian_renderer import render_batch
from gaussian_renderer.compositing import from_bytes, to_bytes
from gaussian_renderer.paste import Backdrops, Place, put_on, read_background
from scene import load_avatar
from scene.cameras import enlarged
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.encoders import Codec, check
from utils.errors import UserError
from utils.image import read_rgb, read_rgba, write_rgb
from utils.pipeline import prefetch
from utils.video import FrameReader, VideoWriter, probe, read_frames


def disc(size=64, radius=18):
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return ((x - size / 2) ** 2 + (y - size / 2) ** 2 < radius**2).float()[None, None]


def test_a_head_rendered_with_its_body_is_put_on_the_bare_background(dataset):  # noqa: F811
    reader = TalkingDatasetReader(dataset)
    np.testing.assert_array_equal(Backdrops(reader, "all")[9], reader.plate)
    np.testing.assert_array_equal(Backdrops(reader, "head")[9], reader.backdrop(9))
    assert np.abs(reader.plate.astype(int) - reader.backdrop(9)).max() > 50
    assert Backdrops(reader, "all", transparent=True)[9].max() == 0  # the body is no backdrop either


def source_video(tmp_path, dataset, x=30, y=10, side=128, width=202, height=151):  # noqa: F811
    """A data set whose frames were cut from a larger video (odd height; the window reaches to its lower edge) and halved."""
    folder = write_tiny_dataset(tmp_path / "full")
    video = tmp_path / "source video.mkv"
    with VideoWriter(video, width, height, codec=Codec("ffv1", "bgr0", {})) as writer:
        for i in range(22):
            picture = np.full((height, width, 3), (10 * i, 100, 30), np.uint8)
            picture[y : y + side, x : x + side] = cv2.resize(read_rgb(folder.frame(i)), (side, side), interpolation=cv2.INTER_CUBIC)
            writer.add(picture)
    folder.crop.write_text(json.dumps({"source_width": width, "source_height": height, "x": x, "y": y, "side": side, "size": 64,
                                       "video": str(video)}))  # fmt: skip
    return folder, video


def test_around_the_head_the_filmed_frame_shows_and_under_the_jaw_the_body_without_it(dataset):  # noqa: F811
    reader = TalkingDatasetReader(dataset)
    pasted, filmed, body = Backdrops(reader, "head", "original")[9], reader.image(9), reader.backdrop(9)
    lip = int(reader.landmarks(9)[51, 1])
    np.testing.assert_array_equal(pasted[: lip - 4], filmed[: lip - 4])  # above the jaw, and far from it
    np.testing.assert_array_equal(pasted[:, :8], filmed[:, :8])
    jaw = np.isin(reader.parsing(9), (1, 11)) & (np.arange(64)[:, None] > lip + 2)
    assert jaw.sum() > 50 and np.abs(pasted[jaw].astype(int) - body[jaw]).mean() < 2  # no second chin


def test_a_headless_frame_shows_all_that_was_filmed_but_the_head(dataset):  # noqa: F811
    reader = TalkingDatasetReader(dataset)
    pasted, filmed, body = Backdrops(reader, "head", "headless")[9], reader.image(9), reader.backdrop(9)
    head = np.isin(reader.parsing(9), (*range(1, 14), 17, 18))
    assert head.sum() > 500 and np.abs(pasted[head].astype(int) - body[head]).max() <= 2
    far = cv2.dilate(head.astype(np.uint8), np.ones((13, 13), np.uint8)) == 0
    assert far.sum() > 500
    np.testing.assert_array_equal(pasted[far], filmed[far])


@pytest.mark.parametrize("options", [{}, {"transparent": True}], ids=["over the plate", "cut out"])
def test_behind_a_face_that_is_drawn_alone_its_hair_stays(dataset, options):  # noqa: F811
    reader = TalkingDatasetReader(dataset)
    hair = np.isin(reader.parsing(9), (17, 18))
    behind = Backdrops(reader, "face", **options)[9]
    assert hair.sum() > 100
    np.testing.assert_array_equal(behind[hair][:, :3], reader.image(9)[hair])
    assert (behind[hair][:, 3:] == 255).all()


def test_a_head_the_size_it_was_filmed_pasted_into_the_source_video_changes_nothing_beside_it(tmp_path, dataset):  # noqa: F811
    folder, video = source_video(tmp_path, dataset)
    reader = TalkingDatasetReader(folder.root)
    backdrops = Backdrops(reader, "head", "full")
    assert backdrops.place == Place(202, 150, 30, 10, 128, 2.0)
    behind = from_bytes(torch.from_numpy(backdrops.batch([5, 6])))
    alpha = disc(128, 36).expand(2, -1, -1, -1)
    truth = from_bytes(torch.from_numpy(np.stack([cv2.resize(reader.image(i), (128, 128)) for i in (5, 6)])))
    picture = to_bytes(put_on(truth * alpha, alpha, behind, 0.0, backdrops.place)).numpy()
    filmed = np.stack([FrameReader(video)[i][:150] for i in (5, 6)])
    outside = np.ones((150, 202), bool)
    outside[10:138, 30:158] = False
    np.testing.assert_array_equal(picture[:, outside], filmed[:, outside])
    difference = np.abs(picture.astype(int) - filmed).mean(-1)
    assert difference[:, 24:120, 44:144].mean() < 6  # the same head again


def test_in_a_larger_source_video_the_head_is_drawn_with_as_many_pixels_as_it_has_there(tmp_path, dataset, trained):  # noqa: F811
    folder, _ = source_video(tmp_path, dataset, side=127)
    reader = TalkingDatasetReader(folder.root)
    place = Backdrops(reader, "head", "full").place
    assert place.scale == 127 / 64 and place.drawn(64, 64) == (128, 128)
    head, conditions = load_avatar(trained), reader.conditions([5])
    with torch.inference_mode():
        small = render_batch(head, conditions, 64, 64)
        conditions.intrinsics = enlarged(conditions.intrinsics, 2.0)
        large = render_batch(head, conditions, 128, 128)
        halved = torch.nn.functional.avg_pool2d(large.rgb, 2)
    assert small.alpha.max() > 0.5 and (halved - small.rgb).abs().mean() < 0.01  # the same view
    picture = put_on(large.rgb, large.alpha, torch.zeros(1, 3, 150, 202), 0.0, place)
    torch.testing.assert_close(picture[..., 10:137, 30:157], large.rgb[..., :127, :127])  # pixel by pixel
    assert (picture[..., 137:, :] == 0).all() and (picture[..., 157:] == 0).all()


def test_frames_of_a_video_come_by_number_forth_and_back(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 32, 32, lossless=True) as writer:
        for i in range(40):
            writer.add(np.full((32, 32, 3), 6 * i, np.uint8))
    monkeypatch.setattr(FrameReader, "BYTES", 3 * 32 * 32 * 7)
    frames = FrameReader(path)
    order = [*range(0, 40), *range(39, -1, -3), 20, 0, 39]
    assert [int(frames[i][0, 0, 0]) for i in order] == [6 * i for i in order]
    assert int(frames[45][0, 0, 0]) == 6 * 39  # beyond the end: the last


def test_threads_that_ask_for_batches_of_frames_do_not_decode_them_again_and_again(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 32, 32, lossless=True) as writer:
        for i in range(160):
            writer.add(np.full((32, 32, 3), i, np.uint8))
    monkeypatch.setattr(FrameReader, "BYTES", 3 * 32 * 32 * 20)
    frames, decoded, decode = FrameReader(path), [], FrameReader._decode
    monkeypatch.setattr(FrameReader, "_decode", lambda self, first: decoded.append(first) or decode(self, first))

    def load(start):
        return [int(frame[0, 0, 0]) for frame in frames.batch(range(start, start + 16))]

    assert [i for batch in prefetch(load, range(0, 160, 16), threads=8, ahead=10) for i in batch] == list(range(160))
    assert len(decoded) <= 12  # 8 blocks


def test_the_person_is_cut_out_as_one_shape_and_put_on_any_background():
    head, body = disc(radius=14), torch.zeros(1, 4, 64, 64)
    body[:, :, 40:] = torch.tensor([0.2, 0.4, 0.6, 1.0])[:, None, None]
    red = torch.tensor([1.0, 0, 0])[None, :, None, None]
    picture = put_on(0.8 * head.expand(1, 3, 64, 64), head, body, 0.0, Place(64, 64), red.expand(1, 3, 64, 64))
    torch.testing.assert_close(picture[..., 5, 5], torch.tensor([[1.0, 0, 0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(picture[..., 30, 32], torch.tensor([[0.8] * 3]), atol=0.02, rtol=0)
    torch.testing.assert_close(picture[..., 60, 5], torch.tensor([[0.2, 0.4, 0.6]]), atol=0.02, rtol=0)
    assert picture[0, 0, 36:48, 32].max() < 0.85  # where head meets body no background shines through
    cut = put_on(0.8 * head.expand(1, 3, 64, 64), head, body, 0.0, Place(64, 64))
    assert cut.shape == (1, 4, 64, 64) and cut[0, 3, 5, 5] < 0.01 and cut[0, 3, 45, 32] > 0.95
    torch.testing.assert_close(cut[0, :3, 30, 32], torch.tensor([0.8] * 3), atol=0.02, rtol=0)


def test_the_filmed_background_leaves_no_rim_of_its_colour_around_the_person():
    head, grey = disc(size=256, radius=80), disc(size=256, radius=79)
    blue = torch.tensor([0.0, 0, 1])[None, :, None, None]  # what a mask a little too large takes along
    filmed = (0.6 * grey + blue * (1 - grey)) * head
    cut = put_on(filmed, head, torch.zeros(1, 4, 256, 256), 0.0, Place(256, 256))[0]
    seen = cut[3] > 0.05
    assert seen.sum() > 0.9 * 3.14 * 79**2
    assert (cut[2] - cut[0])[seen].max() < 0.2 and cut[0][seen].min() > 0.5


def test_what_is_thinner_than_the_rim_keeps_its_colour():
    hair = torch.zeros(1, 1, 256, 256)
    hair[..., 100:103, 20:200] = 1
    cut = put_on(0.7 * hair.expand(1, 3, 256, 256), hair, torch.zeros(1, 4, 256, 256), 0.0, Place(256, 256))[0]
    seen = cut[3] > 0.01
    assert seen.any() and (cut[:3, seen] - 0.7).abs().max() < 0.02


def test_a_background_may_be_a_picture_of_any_shape_or_a_colour(tmp_path):
    wide = np.zeros((50, 200, 3), np.uint8)
    wide[:, 100:] = 255
    write_rgb(tmp_path / "wide 图.png", wide)
    filled = read_background(str(tmp_path / "wide 图.png"), 64, 64)
    assert filled.shape == (64, 64, 3) and filled[:, :20].max() == 0 and filled[:, -20:].min() == 255  # centred, not squeezed
    assert read_background("green", 4, 2).tolist() == [[[0, 255, 0]] * 4] * 2
    assert read_background("#102030", 1, 1).tolist() == [[[16, 32, 48]]]
    with pytest.raises(UserError, match="beach.jpg"):
        read_background("beach.jpg", 4, 4)


def render_custom(model, tmp_path, *options):  # noqa: F811
    speak(tmp_path / "a.wav", seconds=0.4)
    render.main(["-m", str(model), "--custom_aud", str(tmp_path / "a.wav"), *options])
    return model / "custom/ours_7/anna_custom_a_7iter_renders"


def test_a_full_paste_is_rendered_at_the_size_of_the_source_video(model, tmp_path, dataset, capsys):  # noqa: F811
    folder, video = source_video(tmp_path, dataset)
    stem = render_custom(model, tmp_path, "-s", str(folder.root), "--paste", "full", "--visualize_attention")
    info = probe(stem.with_suffix(".mp4"))
    assert (info.width, info.height, info.has_audio) == (202, 150, True)
    video.rename(tmp_path / "elsewhere.mkv")
    said = failure(capsys, "-m", model, "-s", folder.root, "--custom_aud", tmp_path / "a.wav", "--paste", "full")
    assert "source video.mkv" in said and "--paste original" in said


def test_alpha_goes_to_prores_4444_or_png_and_leaves_the_background_out(model, tmp_path):  # noqa: F811
    stem = render_custom(model, tmp_path, "--alpha")
    with av.open(str(stem.with_suffix(".mov"))) as container:
        assert container.streams.video[0].codec_context.name == "prores" and container.streams.audio
        frame = next(container.decode(video=0))
        assert "yuva" in frame.format.name
        alpha = frame.to_ndarray(format="rgba")[..., 3]
    assert alpha[:4].max() < 8 and alpha[30:34, 30:34].min() > 120 and alpha[61:].min() > 200  # nothing, the head, the body
    render_custom(model, tmp_path, "--alpha", "png")
    pictures = sorted(stem.iterdir())
    assert [p.name for p in pictures] == [f"{k:05d}.png" for k in range(10)]
    assert np.abs(read_rgba(pictures[0])[..., 3].astype(int) - alpha).mean() < 4


def test_a_green_background_fills_everything_but_the_person(model, tmp_path):  # noqa: F811
    stem = render_custom(model, tmp_path, "--background", "green", "--lossless")
    frame = next(iter(read_frames(stem.with_suffix(".mp4"))))
    assert (frame[:4] == (0, 255, 0)).all() and np.abs(frame[32, 32].astype(int) - (0, 255, 0)).sum() > 200


def test_the_test_split_can_be_measured_on_the_filmed_frames(model, dataset):  # noqa: F811
    render.main(["-m", str(model), "--skip_train", "--paste", "original"])
    assert json.loads((model / "test/ours_7/frames.json").read_text())["paste"] == "original"
    reader = TalkingDatasetReader(dataset)
    picture, filmed = read_rgb(model / "test/ours_7/renders/00000.png"), reader.image(reader.splits["val"][0])
    assert np.abs(picture[:5].astype(int) - filmed[:5]).max() <= 1


@pytest.mark.parametrize("encoder", ["libx264", "libx265"])
def test_an_encoder_may_be_chosen(model, tmp_path, encoder):  # noqa: F811
    stem = render_custom(model, tmp_path, "--encoder", encoder, "--crf", "30", "--smooth_lips", "--blink", "generate")
    with av.open(str(stem.with_suffix(".mp4"))) as container:
        assert container.streams.video[0].codec_context.name == {"libx264": "h264", "libx265": "hevc"}[encoder]
    assert sum(1 for _ in read_frames(stem.with_suffix(".mp4"))) == 10


def test_an_encoder_that_cannot_run_here_is_one_sentence():
    with pytest.raises(UserError, match="h264_none is not part of this FFmpeg"):
        check(Codec("h264_none", "yuv420p", {}), 64, 64)
    with pytest.raises(UserError, match="does not work on this machine"):
        check(Codec("libx264", "yuv420p", {"preset": "no such"}), 64, 64)


def test_what_an_encoder_says_is_told_in_one_line(monkeypatch):
    def create(name, mode):
        raise av.FFmpegError(1, "Operation not permitted", None, (8, "h264_nvenc", "Cannot load libcuda.so.1\n"))

    monkeypatch.setattr("utils.encoders.av.CodecContext", types.SimpleNamespace(create=create))
    with pytest.raises(UserError, match=r"for pictures of 64x48 \(Cannot load libcuda.so.1\); choose another --encoder$"):
        check(Codec("h264_nvenc", "yuv420p", {}), 64, 48)


@pytest.mark.parametrize("bad, names", [
    (["--paste", "full"], "--paste"), (["--background", "green"], "--background"), (["--alpha"], "--alpha"),
    (["--blink", "generate"], "--blink"), (["--smooth_lips"], "--smooth_lips"),
    (["--custom_aud", "a", "--alpha", "--paste", "original"], "--alpha"),
    (["--custom_aud", "a", "--background", "green", "--paste", "original"], "--background"),
    (["--custom_aud", "a", "--lossless", "--encoder", "libx265"], "--lossless"), (["--encoder", "no"], "--encoder"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused_before_anything_is_read(bad, names, capsys):
    with pytest.raises(SystemExit) as stop:
        render.main(bad)
    assert stop.value.code == 2 and names in capsys.readouterr().err.splitlines()[-1]


def test_a_background_that_is_none_is_refused_by_name(model, tmp_path, capsys):  # noqa: F811
    speak(tmp_path / "a.wav", seconds=0.1)
    assert "beach.jpg" in failure(capsys, "-m", model, "--custom_aud", tmp_path / "a.wav", "--background", "beach.jpg")
