"""Ctrl-C while rendering: what was drawn is kept and plays, nothing half done is left for others to take."""

import itertools
import signal

import pytest
from test_render import dataset, model, speak, speech_features, trained  # noqa: F401  fixtures

import render
from utils.audio import load_audio
from utils.pipeline import Consumer
from utils.video import VideoWriter, read_frames
from utils.video_process import VideoProcess


@pytest.fixture
def interrupting(monkeypatch):
    """interrupting(owner, name, *calls): press Ctrl-C just before those calls (counted from 1) of `owner.name`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where the suite runs in the background it is ignored

    def press(owner, name, *calls):
        original, counter = getattr(owner, name), itertools.count(1)

        def called(*a, **k):
            if next(counter) in calls:
                signal.raise_signal(signal.SIGINT)
            return original(*a, **k)

        monkeypatch.setattr(owner, name, called)

    yield press
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "owner, name, calls, frames",
    [
        (render, "render_batch", (2,), 10),  # while drawing
        (render, "render_batch", (2, 3), 10),  # a second one changes nothing
        (Consumer, "put", (4,), 15),  # between two files of one batch
        (Consumer, "close", (1,), 40),  # all is drawn, and waits for the encoders
        (VideoProcess, "__exit__", (1,), 40),
        (VideoWriter, "__exit__", (1,), 40),  # while the sound and the end of the files are written
    ],
)
def test_ctrl_c_leaves_videos_of_equal_length_that_play_and_end_in_sync(
    model, tmp_path, interrupting, capfd, owner, name, calls, frames  # noqa: F811
):
    speak(tmp_path / "a.wav", seconds=1.6)
    interrupting(owner, name, *calls)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        render.main(["-m", str(model), "--custom_aud", str(tmp_path / "a.wav"), "--batch", "5", "--visualize_attention"])
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) is handler
    said = capfd.readouterr()
    assert said.err.count("finishing the file") == 1 and ("stopped by Ctrl-C" in said.out) == (frames < 40)
    videos = list((model / "custom/ours_7").iterdir())
    assert len(videos) == 6 and {sum(1 for _ in read_frames(video)) for video in videos} == {frames}
    for video in (model / "custom/ours_7").glob("*iter_renders.mp4"):
        assert abs(len(load_audio(video)) - frames * 640) <= 2048


def test_ctrl_c_ends_the_program_after_the_clip_it_was_pressed_in(model, interrupting):  # noqa: F811
    interrupting(Consumer, "close", 1)
    with pytest.raises(SystemExit):
        render.main(["-m", str(model)])
    assert (model / "train").exists() and not (model / "test").exists()


def test_an_interrupted_test_split_is_not_left_for_metrics_to_measure(model, interrupting):  # noqa: F811
    render.main(["-m", str(model), "--skip_train", "--batch", "1"])
    interrupting(render, "render_batch", 1)
    with pytest.raises(SystemExit):
        render.main(["-m", str(model), "--skip_train", "--batch", "1"])
    assert not (model / "test/ours_7/frames.json").exists()


def test_ctrl_c_before_the_first_frame_promises_nothing_that_is_not_so(model, tmp_path, interrupting, capsys):  # noqa: F811
    speak(tmp_path / "a.wav", seconds=0.2)
    interrupting(render, "load_avatar", 1)
    with pytest.raises(SystemExit) as stop:
        render.main(["-m", str(model), "--custom_aud", str(tmp_path / "a.wav")])
    assert stop.value.code == 130 and capsys.readouterr().err.splitlines() == ["stopped"]
