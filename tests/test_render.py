"""render.py on a small head: the right frames, the right sound, files that play, and one sentence for each mistake."""

import argparse
import json
import os
import shutil
import threading

import av
import numpy as np
import pytest
import soundfile
import torch
from tiny_dataset import write_tiny_dataset

import arguments
import render
from scene import Scene
from scene.condition import AUDIO_WINDOW
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.audio import load_audio, load_sound
from utils.errors import UserError
from utils.image import read_rgb
from utils.video import probe, read_frames

SMALL = {"plane_resolution": 8, "plane_channels": 8, "net_width": 16, "seed_points": 50, "sh_degree": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("data 数据") / "tiny").root


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A head as training begins: it has a shape and colours, which is all that rendering needs."""
    model = tmp_path_factory.mktemp("models") / "anna"
    torch.manual_seed(0)
    config = arguments.merge(argparse.Namespace(source_path=str(dataset), model_path=str(model), **SMALL))
    head = Scene(config).create_head()
    head.iteration = 7
    head.save(model)
    return model


@pytest.fixture
def model(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "model" / "anna")


@pytest.fixture(autouse=True)
def speech_features(monkeypatch):
    """The features of the small data set belong to no encoder: its first column is the loudness."""

    def stream(name, samples, frames):
        for i in range(frames):
            row = np.zeros((1, 12), np.float32)
            row[0, 0] = np.abs(samples[i * 640 : (i + 1) * 640]).mean()
            yield row

    monkeypatch.setattr(render.speech, "stream", stream)


def speak(path, seconds=1.3, rate=16_000, channels=1):
    """A tone that grows louder; returns the samples (S, C)."""
    time = np.arange(int(seconds * rate)) / rate
    samples = np.stack([0.3 * np.sin(2 * np.pi * (300 + 200 * c) * time) * time / seconds for c in range(channels)], 1)
    soundfile.write(path, samples, rate)
    return samples


def failure(capsys, *arguments):
    """The one sentence with which render.py refuses."""
    with pytest.raises(SystemExit) as stop:
        render.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err.splitlines()  # perhaps a progress bar, then the sentence
    assert stop.value.code == 2 and said[-1].startswith("error: ") and not any("Traceback" in line for line in said)
    return said[-1]


def test_a_start_time_may_be_written_in_hours_minutes_or_seconds():
    assert [render.parse_time(t) for t in ("00:01:00", "1:30", "2.5", "1:00:00.5", "0")] == [60, 90, 2.5, 3600.5, 0]
    for text in ("-3", "a", "1:2:3:4", "", "1:-2"):
        with pytest.raises(argparse.ArgumentTypeError, match="hh:mm:ss"):
            render.parse_time(text)


@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2), (11_111, 1)])
def test_speech_of_any_rate_and_channel_count_is_heard_as_given_over_25_frames_a_second(model, tmp_path, rate, channels):
    samples = speak(tmp_path / "wörd 1.wav", seconds=0.95, rate=rate, channels=channels)
    render.main(["-m", str(model), "--custom_aud", str(tmp_path / "wörd 1.wav")])
    video = model / "custom" / "ours_7" / "anna_custom_wörd 1_7iter_renders.mp4"
    assert sum(1 for _ in read_frames(video)) == 23  # floor(25 x 0.95)
    heard, heard_rate = load_sound(video)
    assert heard_rate == (48_000 if rate == 11_111 else rate) and len(heard) == channels
    if rate == heard_rate:
        length = min(heard.shape[1], len(samples))
        assert abs(heard.shape[1] - len(samples)) < 2048  # an AAC frame or two of padding
        middle = slice(length // 4, length * 3 // 4)
        for a, b in zip(heard, samples.T, strict=True):
            assert np.corrcoef(a[:length][middle], b[:length][middle])[0, 1] > 0.99  # also says: not shifted


def test_speech_longer_than_the_clip_replays_its_poses_from_the_chosen_start(model, dataset, tmp_path, monkeypatch):
    speak(tmp_path / "a.wav", seconds=3.0)
    seen = {}
    original = render.batch_conditions

    def conditions(reader, clip, start, *batch):
        made = original(reader, clip, start, *batch)
        seen[start] = batch[0], made
        return made

    monkeypatch.setattr(render, "batch_conditions", conditions)
    render.main(["-m", str(model), "--custom_aud", str(tmp_path / "a.wav"), "--ss", "0.2", "--batch", "7", "--no-close_mouth"])
    ids = [i for start in sorted(seen) for i in seen[start][0]]
    assert len(ids) == 75 and 3 not in ids and set(ids) == set(range(22)) - {3}  # frame 3 is not usable
    assert ids[0] == 5 and np.abs(np.diff(ids)).max() <= 2
    views = np.concatenate([seen[start][1].view.numpy() for start in sorted(seen)])
    step = np.abs(np.diff(TalkingDatasetReader(dataset).views[[0, 1]].numpy(), axis=0)).max()  # the head turns evenly
    assert np.abs(np.diff(views, axis=0)).max() < 1.05 * step  # so it does without frame 3, too
    loudness = np.concatenate([seen[start][1].audio[:, AUDIO_WINDOW // 2, 0] for start in sorted(seen)])  # the tone grows louder
    assert (np.diff(loudness) > 0).all()
    windows = np.concatenate([seen[start][1].audio[:, :, 0] for start in sorted(seen)])
    np.testing.assert_array_equal(windows[10, 1:], windows[11, :-1])  # across batches too
    assert (windows[0, : AUDIO_WINDOW // 2] == 0).all() and (windows[-1, AUDIO_WINDOW // 2 + 1 :] == 0).all()


def test_speech_shorter_than_a_frame_gives_one_frame(model, tmp_path):
    speak(tmp_path / "a.wav", seconds=0.01)
    render.main(["-m", str(model), "--custom_aud", str(tmp_path / "a.wav")])
    assert sum(1 for _ in read_frames(model / "custom/ours_7/anna_custom_a_7iter_renders.mp4")) == 1


def test_the_splits_are_rendered_beside_what_was_filmed(model, dataset):
    render.main(["-m", str(model), "--lossless"])
    reader = TalkingDatasetReader(dataset)
    for split, ids in (("train", reader.splits["train"]), ("test", reader.splits["val"])):
        folder = model / split / "ours_7"
        for kind in ("renders", "gt"):
            frames = list(read_frames(folder / f"anna_{split}_7iter_{kind}.mp4"))
            assert len(frames) == len(ids)
            if split == "test":  # what metrics.py measures is what the video shows
                pictures = sorted((folder / kind).glob("*.png"))
                assert [p.name for p in pictures] == [f"{k:05d}.png" for k in range(len(ids))]
                for picture, frame in zip(pictures, frames, strict=True):
                    np.testing.assert_array_equal(read_rgb(picture), frame)
        for frame, i in zip(frames, ids, strict=True):
            np.testing.assert_array_equal(frame, reader.image(i))
    facts = json.loads((model / "test/ours_7/frames.json").read_text())
    assert facts["ids"] == reader.splits["val"] and facts["iteration"] == 7
    assert not (model / "train/ours_7/renders").exists() and not (model / "custom").exists()


def test_a_split_is_heard_with_its_own_sound(model, dataset):
    render.main(["-m", str(model), "--skip_train"])
    ids = TalkingDatasetReader(dataset).splits["val"]
    own = load_audio(dataset / "aud.wav")[ids[0] * 640 : (ids[-1] + 1) * 640]
    heard = load_audio(model / "test/ours_7/anna_test_7iter_renders.mp4")[: len(own)]
    assert np.corrcoef(heard, own)[0, 1] > 0.9
    assert not (model / "train").exists()


def test_the_head_lies_over_the_torso_and_background_of_its_frame(model, dataset):
    render.main(["-m", str(model), "--skip_train", "--feather", "0"])
    reader = TalkingDatasetReader(dataset)
    picture = read_rgb(model / "test/ours_7/renders/00000.png").astype(int)
    backdrop = reader.backdrop(reader.splits["val"][0]).astype(int)
    assert np.abs(picture[:4] - backdrop[:4]).max() <= 1 and np.abs(picture[-3:] - backdrop[-3:]).max() <= 1
    assert np.abs(picture[28:36, 28:36] - backdrop[28:36, 28:36]).mean() > 30


def test_attention_is_drawn_for_every_token_and_in_a_mosaic(model, tmp_path):
    speak(tmp_path / "a.wav", seconds=0.4)
    render.main(["-m", str(model), "--custom_aud", str(tmp_path / "a.wav"), "--visualize_attention"])
    names = {path.name for path in (model / "custom/ours_7").iterdir()}
    assert names == {f"anna_custom_a_7iter_{n}.mp4" for n in (
        "renders", "attention", "attention_audio", "attention_expression", "attention_camera", "attention_frame")}  # fmt: skip
    mosaic = probe(model / "custom/ours_7/anna_custom_a_7iter_attention.mp4")
    assert (mosaic.width, mosaic.height, mosaic.has_audio) == (3 * 256, 2 * 256, True)
    frames = [f for f in read_frames(model / "custom/ours_7/anna_custom_a_7iter_attention.mp4")]
    assert len(frames) == 10
    middle = frames[0][128, 256 + 128].astype(int)
    assert middle.sum() > 60 and np.abs(frames[0][60, 256 + 250].astype(int) - (0, 0, 3)).max() < 16  # head lit, backdrop not


def test_the_newest_model_is_taken_when_none_is_named(model, tmp_path, monkeypatch, capsys):
    older = shutil.copytree(model, tmp_path / "model" / "older")
    for path in older.rglob("deformation.safetensors"):
        os.utime(path, (1e9, 1e9))
    monkeypatch.chdir(tmp_path)
    speak(tmp_path / "a.wav", seconds=0.1)
    render.main(["--custom_aud", "a.wav"])
    assert (model / "custom").exists() and not (older / "custom").exists()
    assert "anna_custom_a_7iter_renders.mp4" in capsys.readouterr().out


@pytest.mark.parametrize("codes, held", [(None, [None, None, 0]), (torch.randn(2000, 12), [0, None, 0])])
def test_the_frame_code_is_held_on_request_and_learned_ones_for_other_speech(model, tmp_path, monkeypatch, codes, held):
    speak(tmp_path / "a.wav", seconds=0.2)
    seen = []
    original = render.load_avatar

    def load(*a):
        head = original(*a)
        token = head.deformation.conditions.tokens["frame"]
        token.codes = codes if codes is None else torch.nn.Parameter(codes.to(token.last.device))
        return seen.append(token) or head

    monkeypatch.setattr(render, "load_avatar", load)
    speech = ["--custom_aud", str(tmp_path / "a.wav")]
    for flags in (speech, [*speech, "--no-still_frame_code"], ["--skip_train", "--still_frame_code"]):
        render.main(["-m", str(model), *flags])
    assert [token.still for token in seen] == held


def test_a_missing_torso_picture_stops_with_its_name_and_leaves_no_half_video(model, dataset, tmp_path, capsys):
    shutil.copytree(dataset, tmp_path / "copy")
    (tmp_path / "copy/torso_imgs/9.png").unlink()
    speak(tmp_path / "a.wav", seconds=1.0)
    said = failure(capsys, "-m", model, "-s", tmp_path / "copy", "--custom_aud", tmp_path / "a.wav")
    assert "9.png" in said and "--task 5" in said
    assert list((model / "custom/ours_7").iterdir()) == []


def test_a_full_disk_while_encoding_ends_in_one_sentence(model, tmp_path, monkeypatch, capsys):
    def add(self, frame):
        raise OSError(28, "No space left on device", "a.mp4")

    monkeypatch.setattr("gaussian_renderer.outputs.VideoWriter.add", add)
    speak(tmp_path / "a.wav", seconds=1.0)
    assert "disk is full" in failure(capsys, "-m", model, "--custom_aud", tmp_path / "a.wav")
    assert list((model / "custom/ours_7").iterdir()) == []


def test_memory_that_runs_out_while_drawing_is_one_sentence_and_leaves_no_half_video(model, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(render, "put_on", full)
    speak(tmp_path / "a.wav", seconds=0.2)
    said = failure(capsys, "-m", model, "--custom_aud", tmp_path / "a.wav", "--batch", "3")
    assert "memory ran out while rendering; give a smaller --batch than 3" in said
    assert not list((model / "custom/ours_7").glob("*.mp4"))


def test_an_output_folder_that_cannot_be_written_is_one_sentence(model, tmp_path, capsys):
    (model / "custom").write_text("a file where the folder should be")
    speak(tmp_path / "a.wav", seconds=0.1)
    assert "nothing can be written into" in failure(capsys, "-m", model, "--custom_aud", tmp_path / "a.wav")


def test_torch_computes_on_the_thread_that_draws_alone(model, tmp_path, monkeypatch):
    speak(tmp_path / "a.wav", seconds=1.0)
    threads, original = set(), torch.Tensor.__getitem__

    def indexed(*arguments):
        threads.add(threading.current_thread().name)
        return original(*arguments)

    monkeypatch.setattr(torch.Tensor, "__getitem__", indexed)
    render.main(["-m", str(model), "--custom_aud", str(tmp_path / "a.wav"), "--batch", "7"])
    assert threads == {threading.main_thread().name}


def test_silence_shuts_the_mouth_and_speech_is_heard_unless_told_otherwise(model, dataset, tmp_path, monkeypatch):
    time = np.arange(16_000 * 2) / 16_000
    soundfile.write(tmp_path / "a.wav", np.where(time < 1, 0.3 * np.sin(1000 * time), 0.0), 16_000)
    heard = {}
    original = render.batch_conditions

    def conditions(reader, clip, start, *batch):
        made = original(reader, clip, start, *batch)
        heard[start] = made.audio[:, AUDIO_WINDOW // 2, 0]
        return made

    monkeypatch.setattr(render, "batch_conditions", conditions)
    shut = float(render.silent_row(TalkingDatasetReader(dataset))[0])
    for flags, silent in (([], shut), (["--no-close_mouth"], 0.0)):
        heard.clear()
        render.main(["-m", str(model), "--custom_aud", str(tmp_path / "a.wav"), *flags])
        levels = np.concatenate([heard[start] for start in sorted(heard)])
        np.testing.assert_allclose(levels[:24], 0.3 * 2 / np.pi, rtol=0.1)
        np.testing.assert_allclose(levels[30:], silent, atol=1e-6)
    assert shut > 0.01  # so the two differ


def test_no_model_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    speak(tmp_path / "a.wav")
    assert "train.py" in failure(capsys, "--custom_aud", "a.wav")
    assert "cfg_args" in failure(capsys, "--custom_aud", "a.wav", "-m", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_audio_that_is_none_or_silent_of_samples_is_refused_by_name(model, tmp_path, capsys):
    (tmp_path / "text.wav").write_text("this is no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode(None))
    for name in ("text.wav", "empty.wav", "mute.mp4", "absent.wav"):
        assert name in failure(capsys, "-m", model, "--custom_aud", tmp_path / name)
    assert not (model / "custom").exists()


@pytest.mark.parametrize("name", ["deformation.safetensors", "point_cloud.ply"])
def test_a_truncated_model_is_refused_by_name(model, capsys, name):
    path = model / "point_cloud/iteration_7" / name
    path.write_bytes(path.read_bytes()[:700])
    assert name in failure(capsys, "-m", model)


def test_a_missing_data_set_is_named_with_the_remedy(model, tmp_path, capsys):
    cfg = model / "cfg_args"
    config = arguments.read_cfg_args(model)
    config.source_path = str(tmp_path / "moved away")
    arguments.write_cfg_args(model, config)
    assert cfg.exists()
    said = failure(capsys, "-m", model)
    assert "moved away" in said and "--source_path" in said


def test_features_of_another_encoder_are_refused(model, dataset, tmp_path, capsys):
    shutil.copytree(dataset, tmp_path / "copy")
    np.save(tmp_path / "copy/aud_mel.npy", np.zeros((22, 80), np.float32))
    assert "width 12" in failure(capsys, "-m", model, "-s", tmp_path / "copy")


def test_an_iteration_that_was_not_saved_is_refused_with_those_that_were(model, capsys):
    assert "choose one of 7" in failure(capsys, "-m", model, "--iteration", "8")


def test_a_start_beyond_the_clip_is_refused(model, tmp_path, capsys):
    speak(tmp_path / "a.wav")
    assert "0.8 s" in failure(capsys, "-m", model, "--custom_aud", tmp_path / "a.wav", "--ss", "00:01:00")


@pytest.mark.parametrize(
    "bad",
    [["--batch", "0"], ["--feather", "-1"], ["--feather", "2000"], ["--feather", "inf"], ["--feather", "nan"],
     ["--crf", "70"], ["--ss", "3"], ["--ss", "-3"], ["--ss", "x", "--custom_aud", "a"], ["--skip_train", "--skip_test"]],
)  # fmt: skip
def test_a_flag_out_of_range_is_refused_before_anything_is_read(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        render.main(bad)
    assert stop.value.code == 2 and bad[0].lstrip("-") in capsys.readouterr().err


def test_bad_input_is_reported_as_an_error_class_of_its_own(tmp_path):
    with pytest.raises(UserError, match="--model_path"):
        render.newest_model(tmp_path)
