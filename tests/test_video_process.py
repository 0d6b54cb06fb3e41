"""Videos written by another process are those that VideoWriter writes, or none."""

import functools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from utils import encoders, video_process
from utils.audio import Sound, load_audio, open_sound, save_wav
from utils.constants import SAMPLE_RATE
from utils.errors import UserError
from utils.video import VideoWriter, read_frames
from utils.video_process import SLOTS, VideoProcess

ROOT = Path(video_process.__file__).parents[1]


def pictures(count: int, size: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(16, 236, (count, size * 3 // 2, size), dtype=np.uint8)


def video(path: Path, size: int = 64, sound: Sound | None = None) -> functools.partial:
    return functools.partial(VideoWriter, path, size, size, sound, codec=encoders.codec(sketch=1))


def write_here(made: functools.partial, frames: np.ndarray) -> Path:
    """The same video, written by this process."""
    with made() as writer:
        for frame in frames:
            writer.add(frame)
    return made.args[0]


def tone(seconds: float) -> np.ndarray:
    return np.sin(np.arange(round(seconds * SAMPLE_RATE)) / 8).astype(np.float32)


@pytest.mark.parametrize("memfd", [True, False])
def test_they_hold_the_frames_and_sound_that_one_process_writes(tmp_path, monkeypatch, memfd):
    """Of two sizes, in more batches than there are slots, of which the last is shorter; names hold spaces and any letters."""
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    save_wav(tmp_path / "a b.wav", tone(1.6))
    monkeypatch.chdir(tmp_path)  # a relative name means the same there
    sounds = Sound.of(tone(1.6), SAMPLE_RATE), open_sound(Path("a b.wav"))
    made = [pictures(39, 64, 0), pictures(39, 32, 1)]
    with VideoProcess([video(tmp_path / "один.mp4", 64, sounds[0]), video(tmp_path / "zwei drei.mp4", 32, sounds[1])]) as process:
        for start in range(0, 39, 3 if memfd else 16):
            process.add([frames[start : start + (3 if memfd else 16)] for frames in made])
    for name, frames, size, sound in zip(("один", "zwei drei"), made, (64, 32), sounds, strict=True):
        there, here = tmp_path / f"{name}.mp4", write_here(video(tmp_path / "here.mp4", size, sound), frames)
        assert np.array_equal(list(read_frames(there)), list(read_frames(here)))
        assert np.array_equal(load_audio(there), load_audio(here))


def test_batches_lie_in_memory_as_they_are_whatever_their_strides(tmp_path):
    """As maps do: (B, K, rows, columns), of which each video takes a k."""
    frames = np.stack([pictures(4, seed=k) for k in range(3)], 1)
    with VideoProcess([video(tmp_path / f"{k}.mp4") for k in range(3)]) as process:
        process.add([*frames.swapaxes(0, 1)])
    for k in range(3):
        here = write_here(video(tmp_path / "here.mp4"), frames[:, k])
        assert (tmp_path / f"{k}.mp4").read_bytes() == here.read_bytes()


def test_they_end_with_the_last_frame_where_told_to(tmp_path):
    lengths = []
    for early in (False, True):
        with VideoProcess([video(tmp_path / "a.mp4", sound=Sound.of(tone(4), SAMPLE_RATE))]) as process:
            process.add([pictures(25)])
            if early:
                process.end_with_last_frame()
        lengths.append(len(load_audio(tmp_path / "a.mp4")) / SAMPLE_RATE)
    assert abs(lengths[0] - 4) < 0.1 and abs(lengths[1] - 1) < 0.1


def test_what_a_writer_cannot_do_is_said_here_in_its_sentence_and_leaves_no_file(tmp_path):
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(UserError, match=r"taken\.mp4 is to be written, but a folder of that name is there; move it away"):
        with VideoProcess([video(tmp_path / "fine.mp4"), video(tmp_path / "taken.mp4")]) as process:
            for _ in range(2 * SLOTS):
                process.add([pictures(2), pictures(2)])
    assert [path.name for path in tmp_path.iterdir()] == ["taken.mp4"]


def test_the_same_is_said_at_the_end_if_not_before(tmp_path):
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(UserError, match="a folder of that name"):
        with VideoProcess([video(tmp_path / "taken.mp4")]) as process:
            process.add([pictures(2)])


def test_a_full_disk_is_said(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match=r"a\.\d+\.part\.mp4 cannot be read or written \(File too large\)"):
        with VideoProcess([video(tmp_path / "a.mp4", 256), video(tmp_path / "b.mp4")]) as process:
            resource.prlimit(process._process.pid, resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as if no more were free
            for _ in range(2 * SLOTS):
                process.add([pictures(4, 256), pictures(4)])
    assert not list(tmp_path.iterdir())


def test_what_goes_wrong_while_all_slots_are_taken_is_noticed(tmp_path):
    """Then nothing new is sent, at which the other process would see that one of its threads has failed."""
    with pytest.raises(RuntimeError, match="KeyError: 5"):
        with VideoProcess([video(tmp_path / "a.mp4"), video(tmp_path / "b.mp4")]) as process:
            for _ in range(3 * SLOTS):  # five channels are no picture; the first are sent before the process has begun to read
                process.add([pictures(4), np.zeros((4, 64, 64, 5), np.uint8)])
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_is_an_error_and_no_wait_without_end(tmp_path):
    with pytest.raises(RuntimeError, match="ended with status -9"):
        with VideoProcess([video(tmp_path / "a.mp4")]) as process:
            process.add([pictures(2)])
            os.kill(process._process.pid, signal.SIGKILL)
            for _ in range(2 * SLOTS):
                process.add([pictures(2)])


def test_an_error_here_or_no_frame_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with VideoProcess([video(tmp_path / "a.mp4")]) as process:
            process.add([pictures(2)])
            raise ZeroDivisionError
    with VideoProcess([video(tmp_path / "a.mp4")]):
        pass
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_when_its_parent_is_killed(tmp_path):
    script = ("import functools, sys, time, numpy as np; from pathlib import Path; from utils import encoders\n"
              "from utils.video import VideoWriter\n"
              "from utils.video_process import VideoProcess\n"
              "codec = encoders.codec(sketch=1)\n"
              "process = VideoProcess([functools.partial(VideoWriter, Path(sys.argv[1]), 64, 64, codec=codec)])\n"
              "process.add([np.zeros((2, 96, 64), np.uint8)])\n"
              "process._process.stdout.read(1)\n"  # it has read them
              "print(process._process.pid, flush=True); time.sleep(60)")  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "a.mp4")], cwd=ROOT, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]  # what it writes meanwhile
    parent.kill()
    parent.communicate()
    for _ in range(600):
        if not Path(f"/proc/{child}").exists() or not list(tmp_path.iterdir()):
            break
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())
