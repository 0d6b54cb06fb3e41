"""What each flag of render.py changes, and that every program says what it can do without a model, a data set or a GPU."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_render import dataset, failure, model, speak, speech_features, trained  # noqa: F401  fixtures

import render
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.constants import BLINK_COLUMNS, UPPER_FACE_COLUMNS
from utils.errors import UserError
from utils.image import read_rgb
from utils.video import read_frames

EYES = [UPPER_FACE_COLUMNS.index(column) for column in BLINK_COLUMNS]


@pytest.fixture
def seen(monkeypatch):
    """The conditions of every frame drawn, by the number of the first frame of their batch."""
    found, original = {}, render.batch_conditions

    def conditions(reader, clip, start, *batch):
        found[start] = original(reader, clip, start, *batch)
        return found[start]

    monkeypatch.setattr(render, "batch_conditions", conditions)
    return found


def joined(seen, name):
    return np.concatenate([getattr(seen[start], name).numpy() for start in sorted(seen)])


def rendered(model, tmp_path, *flags, seconds=0.4):  # noqa: F811
    speak(tmp_path / "a.wav", seconds=seconds)
    render.main(["-m", str(model), "--custom_aud", str(tmp_path / "a.wav"), *flags])
    return model / "custom/ours_7"


@pytest.mark.parametrize("program", ["render", "metrics", "train", "benchmarks.speed", "benchmarks.long"])
def test_help_needs_nothing_and_explains_every_flag(program, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program).main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "usage:" in said and "-h, --help" in said
    assert all(len(line) <= 140 for line in said.splitlines())


HELP = """
import contextlib, io, runpy, sys
sys.argv = [sys.argv[1], "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
    runpy.run_path(sys.argv[0], run_name="__main__")
torch = sys.modules.get("torch")
print("usage:" in said.getvalue(), torch is not None, torch is not None and torch.cuda.is_initialized(),
      *({"mediapipe", "ctranslate2", "face_alignment", "librosa", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize("program, torch", [
    ("data_utils/make_demo.py", False), ("data_utils/process.py", False), ("utils/model_store.py", False),
    ("render.py", True), ("metrics.py", True), ("train.py", True),
])  # fmt: skip
def test_help_opens_no_gpu_loads_no_network_and_where_it_can_no_torch(program, torch, tmp_path):
    command = [sys.executable, "-c", HELP, str(ROOT / program)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.split() == ["True", str(torch), "False"], done.stderr


def test_25_frames_a_second_may_be_asked_for_and_no_other_number(capsys):
    assert render.parse_arguments(["--fps", "25"]).fps == 25
    with pytest.raises(SystemExit) as stop:
        render.main(["--fps", "30"])
    assert stop.value.code == 2 and "--fps" in capsys.readouterr().err


def test_generated_blinks_replace_a_gaze_that_never_blinks_and_only_the_eyes(model, dataset, tmp_path, seen):  # noqa: F811
    reader = TalkingDatasetReader(dataset)  # its eyes stay open
    ids = reader.ids * 30  # 25 s
    brows = [k for k in range(7) if k not in EYES]
    for how in ("auto", "generate"):
        curves = render.driven_expression(reader, reader.expression[ids], how)
        shut = curves[:, EYES].mean(1)
        assert ((shut[1:] > 0.5) & (shut[:-1] <= 0.5)).sum() >= 3 and np.median(shut) < 0.2  # a few blinks, else open
        np.testing.assert_array_equal(curves[:, brows], reader.expression[ids][:, brows])
    replayed = render.driven_expression(reader, reader.expression[ids], "replay")
    np.testing.assert_array_equal(replayed, reader.expression[ids])
    rendered(model, tmp_path, "--blink", "generate")
    opened = np.median(reader.expression[reader.ids][:, EYES[0]])  # the first blink comes after two seconds
    np.testing.assert_allclose(joined(seen, "expression")[:, EYES[0]], opened, rtol=1e-5)


def test_whether_blinks_are_generated_is_decided_by_the_source_clip_however_short_the_speech(dataset):  # noqa: F811
    reader = TalkingDatasetReader(dataset)  # its eyes stay open

    def most_shut(ids):
        replayed = np.where(reader.expression[ids] < 0.5, reader.expression[ids], 0)
        return render.driven_expression(reader, replayed, "auto")[:, EYES].max()

    assert most_shut((reader.ids * 6)[:125]) > 0.5  # five seconds
    reader.expression = reader.expression.copy()
    reader.expression[7:10, EYES] = 1.0  # now it blinks: what is replayed serves
    assert most_shut((reader.ids * 6)[:125]) < 0.5
    assert most_shut([0, 1, 2] * 200) > 0.5  # 24 s of the part where it does not


def test_smooth_lips_mix_the_neighbours_into_each_row(model, tmp_path, seen):  # noqa: F811
    loudness = {}
    for flags in ((), ("--smooth_lips",)):
        seen.clear()
        rendered(model, tmp_path, "--no-close_mouth", *flags)
        audio = joined(seen, "audio")
        loudness[flags] = audio[:, audio.shape[1] // 2, 0]
    plain, smooth = loudness.values()
    np.testing.assert_allclose(smooth[1:-1], 0.175 * (plain[:-2] + plain[2:]) + 0.65 * plain[1:-1], rtol=1e-4)
    assert np.abs(smooth - plain).max() > 1e-5


def test_every_frame_is_a_picture_too_where_asked_for(model, tmp_path):  # noqa: F811
    folder = rendered(model, tmp_path, "--pictures", "--lossless")
    pictures = sorted((folder / "renders").iterdir())
    frames = list(read_frames(folder / "anna_custom_a_7iter_renders.mp4"))
    assert [p.name for p in pictures] == [f"{k:05d}.png" for k in range(10)] and len(frames) == 10
    for path, frame in zip(pictures, frames, strict=True):
        np.testing.assert_array_equal(read_rgb(path), frame)


def test_feather_lets_the_backdrop_through_at_the_edge_only(model, dataset, tmp_path):  # noqa: F811
    frames = {}
    for feather in ("0", "12"):
        folder = rendered(model, tmp_path, "--feather", feather, "--lossless")
        frames[feather] = next(read_frames(folder / "anna_custom_a_7iter_renders.mp4")).astype(int)
    backdrop = TalkingDatasetReader(dataset).backdrop(0).astype(int)
    change = np.abs(frames["12"] - frames["0"]).sum(2)
    assert change.max() > 30 and change[:3].max() == 0  # something became softer, nothing far from the head
    nearer = np.abs(frames["12"] - backdrop).sum() < np.abs(frames["0"] - backdrop).sum()
    assert nearer and np.abs(frames["12"] - backdrop)[28:36, 28:36].mean() > 20  # the head is still there


def test_crf_sets_the_quality_and_the_size(model, tmp_path):  # noqa: F811
    sizes = []
    for crf in ("0", "40"):
        sizes.append((rendered(model, tmp_path, "--crf", crf) / "anna_custom_a_7iter_renders.mp4").stat().st_size)
    assert sizes[0] > 1.2 * sizes[1]


def not_reached(*arguments):
    raise AssertionError("too late")


@pytest.mark.parametrize("flags, taken", [
    ((), "anna_custom_a_7iter_renders.mp4/"), (("--alpha", "png"), "anna_custom_a_7iter_renders"),
    (("--pictures",), "renders"), (("--alpha",), "anna_custom_a_7iter_renders.mov/"),
])  # fmt: skip
def test_a_name_that_is_taken_is_said_before_anything_is_drawn(model, tmp_path, capsys, monkeypatch, flags, taken):  # noqa: F811
    path = model / "custom/ours_7" / taken
    path.parent.mkdir(parents=True)
    path.mkdir() if taken.endswith("/") else path.write_text("a file where the folder should be")
    monkeypatch.setattr(render, "render_batch", not_reached)
    speak(tmp_path / "a.wav", seconds=0.1)
    assert str(path) in failure(capsys, "-m", model, "--custom_aud", tmp_path / "a.wav", *flags)


def test_a_very_long_name_of_the_speech_is_cut_in_the_names_of_the_videos(model, tmp_path):  # noqa: F811
    speech = tmp_path / f"{'说' * 80}.wav"
    speak(speech, seconds=0.1)
    render.main(["-m", str(model), "--custom_aud", str(speech), "--visualize_attention"])
    names = [path.name for path in (model / "custom/ours_7").iterdir()]
    assert len(names) == 6 and all("anna_custom_说说" in name and "_7iter_" in name for name in names)


def test_a_name_no_file_system_takes_is_one_sentence(model, tmp_path, capsys):  # noqa: F811
    said = failure(capsys, "-m", model, "--custom_aud", tmp_path / f"{'a' * 300}.wav")
    assert "aaa.wav" in said and "too long" in said


def test_the_encoder_is_tried_at_the_size_of_the_video_before_anything_is_drawn(model, tmp_path, capsys, monkeypatch):  # noqa: F811
    def check(chosen, width, height, remedy):
        if width == 64:
            raise UserError("too small")

    monkeypatch.setattr(render.encoders, "check", check)
    monkeypatch.setattr(render, "render_batch", not_reached)
    speak(tmp_path / "a.wav", seconds=0.1)
    assert "too small" in failure(capsys, "-m", model, "--custom_aud", tmp_path / "a.wav")


def test_a_text_for_a_background_is_not_said_to_come_from_a_stage(model, tmp_path, capsys):  # noqa: F811
    (tmp_path / "text.jpg").write_text("this is no picture")
    speak(tmp_path / "a.wav", seconds=0.1)
    said = failure(capsys, "-m", model, "--custom_aud", tmp_path / "a.wav", "--background", tmp_path / "text.jpg")
    assert "text.jpg is no picture" in said and "stage" not in said


def test_only_the_training_frames_are_rendered_if_the_held_out_ones_are_skipped(model, tmp_path):  # noqa: F811
    render.main(["-m", str(model), "--skip_test"])
    assert (model / "train").exists() and not (model / "test").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:x"])
def test_an_unknown_device_is_refused_by_name(model, tmp_path, capsys, device):  # noqa: F811
    speak(tmp_path / "a.wav", seconds=0.1)
    assert device in failure(capsys, "-m", model, "--custom_aud", tmp_path / "a.wav", "--device", device)
