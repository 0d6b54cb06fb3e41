"""process.py: where a data set goes, what is redone, how bad input ends, and that a kill changes nothing."""

import dataclasses
import errno
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from data_utils import frames, process, report
from data_utils import stage as stage_module
from data_utils.landmarks import read_dense
from data_utils.process import STAGES
from data_utils.stage import Stage, run_stage, why_stale
from tests.test_quality import landscape, tone, write_clip
from utils.dataset_folder import DatasetFolder
from utils.errors import UserError
from utils.files import read_json, sha256, write_json
from utils.image import read_rgb
from utils.video import read_frames

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder to run process.py in; its data sets go to data/ there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *argv) -> str:
    """Run process.py on bad input: exit code 2 and one error line on stderr, which is returned."""
    with pytest.raises(SystemExit) as ended:
        process.main([str(word) for word in argv])
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return errors[0]


def contents(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# where, what and when


def test_the_next_command_keeps_what_was_asked_for_and_nothing_of_the_one_run():
    argv = ["my clip.mp4", "--size", "256", "--av_offset", "-3", "--use_3dmm", "--audio", "mel"]
    options = process.arguments([*argv, "--task", "2", "--end_task", "4", "--force"])
    words = shlex.split(options.same_again)
    assert sorted(words) == sorted(argv)
    again = process.arguments(words)
    for stage in process.STAGES:
        assert [getattr(again, name) for name in stage.options] == [getattr(options, name) for name in stage.options]


def test_the_next_command_is_printed_as_the_report_has_it(processed, demo_clip, home, capsys, monkeypatch):
    """Also where --use_3dmm leaves a stage out, and with the part that train.py will model."""
    shutil.copytree(processed[0].root, home / "data" / "demo")
    monkeypatch.setattr(process, "STAGES", tuple(s for s in process.STAGES if s.number in (2, 6, 8, 9, 10)))
    record = read_json(processed[0].state / "blendshapes.json")
    write_json(home / "data/demo/.state/transforms.json", record | {"name": "transforms"})
    process.main([str(demo_clip), "--size", "128", "--use_3dmm", "--part", "face", "--task", "9"])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "next: " + read_json(home / "data/demo/report.json")["next"] == "next: python train.py -s data/demo --part face"
    process.main([str(demo_clip), "--size", "128", "--part", "face", "--task", "9"])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"next: python data_utils/process.py {shlex.quote(str(demo_clip))} --size 128 --part face"


def test_a_video_in_a_data_folder_is_processed_where_it_lies_and_any_other_goes_to_its_name(home):
    assert process.data_folder(Path("data/anna/clip.mp4")).root == Path("data/anna")
    assert process.data_folder(home / "data" / "anna" / "clip.mp4").root == home / "data" / "anna"
    assert process.data_folder(Path("other/data/anna/clip.mp4")).root == Path("other/data/anna")
    assert process.data_folder(Path("clips/bob talks.mp4")).root == Path("data/bob talks")


@pytest.mark.parametrize(
    ("argv", "numbers"),
    [("", range(11)), ("--task 2 --end_task 4", (0, 2, 3, 4)), ("--task 7", (7,)), ("--end_task 2", (0, 1, 2))],
)
def test_a_range_of_stages_is_inclusive_and_one_task_is_one_stage(argv, numbers):
    chosen = process.chosen_stages(process.arguments(["a.mp4", *argv.split()]))
    assert [stage.number for stage in chosen] == list(numbers)


@pytest.mark.parametrize("argv", [["--task", "11"], ["--task", "0"], ["--task", "5", "--end_task", "4"]])
def test_a_range_that_does_not_exist_is_refused(argv):
    with pytest.raises(UserError, match="numbered 1 to 10"):
        process.chosen_stages(process.arguments(["a.mp4", *argv]))


def test_frames_are_25_a_second_of_the_asked_size_with_landmarks_in_their_pixels(processed):
    folder, truth = processed
    frames = len(truth["lip_opening"])
    dense = read_dense(folder)
    assert folder.frame_count() == frames == len(dense["found"]) and dense["found"].all()
    assert read_rgb(folder.frame(0)).shape == (128, 128, 3)
    assert dense["points"].shape == (frames, 478, 3) and dense["points"].dtype == np.float32
    assert dense["blendshapes"].shape == (frames, 52) and (dense["faces"] == 1).all()
    assert read_json(folder.valid)["valid"] == list(range(frames))


def test_landmarks_are_the_same_on_any_number_of_cores(processed, monkeypatch):
    pictures = [read_rgb(processed[0].frame(i)) for i in range(40)]
    found = []
    for cores in (2, 6):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        found.append([face.points for faces in frames._detect(pictures) for face in faces])
    assert len(found[0]) == 40 and all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_a_finished_stage_is_not_run_again_and_force_runs_it(processed, demo_clip, capsys, monkeypatch):
    folder, _ = processed
    monkeypatch.chdir(folder.root.parents[1])
    process.main([str(demo_clip), "--size", "128", "--task", "9"])
    assert "blendshapes: up to date" in capsys.readouterr().out
    process.main([str(demo_clip), "--size", "128", "--task", "9", "--force"])
    assert "blendshapes: --force" in capsys.readouterr().out


def test_the_record_of_a_stage_tells_seconds_and_memory(processed):
    record = read_json(processed[0].state / "frames.json")
    assert record["seconds"] > 0 and 50 < record["peak_memory_mb"] < 4000
    assert record["facts"]["backend"] == "mediapipe" and record["facts"]["frames"] == 110


def test_the_report_is_one_page_that_shows_frames_and_the_next_command(processed):
    folder, _ = processed
    summary, page = read_json(folder.report), folder.report.with_suffix(".html").read_text()
    assert summary["frames"] == summary["valid"] == 110
    assert {"frames", "landmarks"} <= {stage["name"] for stage in summary["stages"]}
    assert summary["next"].startswith("python data_utils/process.py") and not summary["complete"]
    assert page.count("data:image/jpeg;base64,") >= report.SHOWN and "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert any("only 4 s long" in warning["text"] for warning in summary["warnings"]) and "only 4 s long" in page


def test_a_kill_in_the_middle_of_a_stage_and_the_same_command_again_give_the_same_files(processed, demo_clip, home, capfd):
    command = [sys.executable, str(ROOT / "data_utils" / "process.py"), str(demo_clip), "--size", "128", "--task", "2"]
    running = subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (home / "data/demo/ori_imgs/30.jpg").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL  # it was killed at work, not done before
    cut_off = home / "data" / "demo"
    assert not (cut_off / ".state" / "frames.json").exists() and not (cut_off / "face_landmarks.npz").exists()
    (cut_off / "ori_imgs" / ".99.1.part.jpg").touch()  # where a kill comes while a file is written, this is left
    for stage in (2, 6, 9):
        process.main([str(demo_clip), "--size", "128", "--task", str(stage)])
    ours, unbroken = contents(cut_off), contents(processed[0].root)
    assert {n: d for n, d in ours.items() if not n.startswith((".state", "report"))} == {
        n: d for n, d in unbroken.items() if not n.startswith((".state", "report"))
    }


# what makes a stage stale


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Two small stages: `first` copies a.txt's lines into parts/, `second` counts them. (folder, stages, options, calls)"""
    calls = []
    folder = DatasetFolder(tmp_path)
    (tmp_path / "a.txt").write_text("1\n2\n3\n")

    def first(folder, options):
        calls.append("first")
        (folder.root / "parts").mkdir(exist_ok=True)
        for i, line in enumerate((folder.root / "a.txt").read_text().splitlines()):
            (folder.root / "parts" / f"{i}.txt").write_text(line * options.repeat)
            if getattr(options, "die_at", None) == i:
                raise KeyboardInterrupt
        return {"backend": "copy", "seconds": np.float32(1.5)}

    def second(folder, options):
        calls.append("second")
        (folder.root / "count.txt").write_text(str(len(list(folder.root.glob("parts/*.txt")))))
        return {}

    for name, run in (("first", first), ("second", second)):
        monkeypatch.setitem(sys.modules, f"tests.fake_{name}", types.SimpleNamespace(run=run))
    stages = (Stage(1, "first", "tests.fake_first", ("a.txt",), ("parts/*.txt",), ("repeat", "how")),
              Stage(2, "second", "tests.fake_second", ("parts/*.txt", "extra.txt?"), ("count.txt",)))  # fmt: skip
    options = types.SimpleNamespace(force=False, repeat=1, how="auto")

    def go():
        calls.clear()
        for stage in stages:
            if why_stale(stage, folder, options):
                run_stage(stage, folder, options)
        return list(calls)

    return folder, stages, options, go


def test_only_what_is_stale_is_run(table):
    folder, _, options, go = table
    assert go() == ["first", "second"] and go() == []
    options.repeat = 2
    assert go() == ["first", "second"]  # what is made of its files is stale too
    (folder.root / "a.txt").write_text("4\n5\n6\n")
    assert go() == ["first"]  # parts of the same names and sizes: nothing changed for the second
    (folder.root / "count.txt").unlink()
    assert go() == ["second"]
    (folder.root / "extra.txt").write_text("an optional input that appeared")
    assert go() == ["second"]
    (folder.root / "parts" / "1.txt").unlink()
    assert go() == ["first"]


def test_naming_the_back_end_that_auto_chose_is_no_change(table):
    _, _, options, go = table
    go()
    options.how = "copy"
    assert go() == []
    options.how = "other"
    assert go() == ["first"]


def test_a_switch_that_came_after_the_record_makes_a_stage_stale_only_when_it_is_on(table):
    _, stages, options, _ = table
    first = dataclasses.replace(stages[0], options=("repeat", "how", "photometric"))
    run_stage(stages[0], table[0], options)
    options.photometric = False
    assert why_stale(first, table[0], options) is None
    options.photometric = True
    assert why_stale(first, table[0], options) == "--photometric was False, now True"
    assert "photometric" in next(stage.options for stage in STAGES if stage.name == "face_tracking")


def test_a_better_back_end_that_appears_is_used_and_one_that_goes_away_is_not_missed(table, monkeypatch):
    _, _, _, go = table
    better = types.SimpleNamespace(name="better", available=lambda: False)
    back_ends = {"better": better, "copy": types.SimpleNamespace(name="copy", available=lambda: True)}
    monkeypatch.setitem(sys.modules, "tests.fake_back_ends", types.SimpleNamespace(TABLE=back_ends))
    monkeypatch.setitem(stage_module.BACKENDS, "how", ("tests.fake_back_ends", "TABLE", 1))
    assert go() == ["first", "second"] and go() == []
    better.available = lambda: True
    assert go() == ["first"]
    monkeypatch.setitem(stage_module.BACKENDS, "how", ("tests.fake_back_ends", "TABLE", -1))  # now "better" is the worst
    assert go() == []


def test_the_tables_of_back_ends_are_where_the_stages_look_for_better_ones():
    for module, table, _ in stage_module.BACKENDS.values():
        found = getattr(importlib.import_module(module), table)
        found = found.values() if isinstance(found, dict) else found
        assert all(backend.name and callable(backend.available) for backend in found)


def test_a_new_version_of_a_stages_code_makes_it_stale(table):
    _, stages, _, go = table
    go()
    stages[0].load().VERSION = 2
    assert go() == ["first"]


def test_frames_of_an_older_longer_clip_do_not_stay_behind(table):
    folder, _, _, go = table
    go()
    (folder.root / "a.txt").write_text("1\n")
    go()
    assert sorted(p.name for p in folder.root.glob("parts/*")) == ["0.txt"] and (folder.root / "count.txt").read_text() == "1"


def test_a_stage_that_was_stopped_is_not_done_and_finds_its_files_when_it_is_run_again(table):
    folder, stages, options, go = table
    options.die_at = 1
    with pytest.raises(KeyboardInterrupt):
        go()
    assert why_stale(stages[0], folder, options) == "not done yet" and (folder.root / "parts" / "1.txt").exists()
    left_over = (folder.root / "parts" / "1.txt").stat().st_ino
    options.die_at = None
    assert go() == ["first", "second"]
    assert (folder.root / "parts" / "1.txt").stat().st_ino == left_over


def test_a_stage_whose_input_is_missing_names_the_stage_that_makes_it(processed, demo_clip, capsys, home):
    assert "stage 2 of data_utils/process.py makes it" in refused(capsys, demo_clip, "--task", 6)


# bad input: one sentence, exit code 2, nothing half-written


def test_a_missing_file_is_refused(home, capsys):
    assert "nowhere.mp4 does not exist" in refused(capsys, "nowhere.mp4")
    assert list(home.iterdir()) == []


def test_what_is_no_video_is_refused(home, capsys):
    (home / "letter.mp4").write_text("dear reader")
    assert "letter.mp4 cannot be read as a video" in refused(capsys, "letter.mp4")
    assert [path.name for path in home.iterdir()] == ["letter.mp4"]


def test_a_sound_file_is_refused_as_it_has_no_picture(home, capsys):
    from utils.audio import save_wav

    save_wav(home / "song.wav", tone(200))
    assert "no video track" in refused(capsys, "song.wav")


@pytest.mark.parametrize(
    ("name", "frames", "audio", "reason"),
    [("mute", 110, False, "no audio track"), ("hills", 110, True, "no face is seen"), ("brief", 50, True, "only 2.0 s long")],
)
def test_clips_that_cannot_work_are_refused_before_anything_is_written(home, capsys, name, frames, audio, reason):
    clip = write_clip(home / f"{name}.mp4", [landscape()] * frames, tone(frames) if audio else None)
    error = refused(capsys, clip, "--size", 128)
    assert reason in error and f"{name}.mp4" in error
    assert [path.name for path in home.iterdir()] == [f"{name}.mp4"]


@pytest.mark.parametrize("share", [0.02, 0.6, 0.9])
def test_a_truncated_video_is_refused_with_its_name(home, capsys, demo_clip, share):
    data = demo_clip.read_bytes()
    (home / "torn.mp4").write_bytes(data[: int(share * len(data))])
    error = refused(capsys, "torn.mp4", "--size", 128)
    assert "torn.mp4" in error and ("truncated" in error)
    assert [path.name for path in home.iterdir()] == ["torn.mp4"]


def test_a_full_disk_ends_in_one_sentence_and_the_next_run_goes_on(home, capsys, demo_clip, monkeypatch):
    from utils import image

    write, written = image.write_bytes, []

    def full_after_20(path, data):
        written.append(path)
        if len(written) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(image, "write_bytes", full_after_20)
    error = refused(capsys, demo_clip, "--size", 128, "--task", 2)
    assert "disk is full" in error and ".jpg" in error
    assert not (home / "data/demo/.state/frames.json").exists() and not list(home.rglob("*.part*"))
    monkeypatch.undo()
    monkeypatch.chdir(home)
    process.main([str(demo_clip), "--size", "128", "--task", "2"])
    assert DatasetFolder(home / "data/demo").frame_count() == 110


def test_too_little_space_is_said_before_the_work(home, capsys, demo_clip, monkeypatch):
    monkeypatch.setattr(process, "free_space", lambda folder: 10**6)
    assert "GB are needed" in refused(capsys, demo_clip, "--size", 512, "--task", 2)
    assert not (home / "data/demo/ori_imgs").exists()


def test_another_video_does_not_replace_a_data_set_of_the_same_name(processed, demo_clip, home, capsys):
    from utils.files import write_json

    other = write_clip(home / "demo.mp4", list(read_frames(demo_clip))[:100], tone(100))
    write_json(home / "data/demo/crop.json", {**read_json(processed[0].crop), "video": str(demo_clip)})
    assert "made from another video" in refused(capsys, other, "--size", 128, "--task", 2)


@pytest.mark.parametrize("argv", [("--size", 100), ("--size", 8), ("--scale", 0), ("--device", "quantum")])
def test_options_that_make_no_sense_are_refused(home, capsys, demo_clip, argv):
    assert argv[0] in refused(capsys, demo_clip, *argv)
    assert list(home.iterdir()) == []


def test_check_gives_the_verdict_alone(home, capsys, demo_clip):
    process.main([str(demo_clip), "--check", "--size", "192"])
    out = capsys.readouterr().out
    assert "usable, 4.4 s at 25 fps" in out and "warning: the clip is only 4 s long" in out
    assert list(home.iterdir()) == []


def test_check_of_a_bad_clip_ends_with_the_reason(home, capsys):
    clip = write_clip(home / "hills.mp4", [landscape()] * 110, tone(110))
    assert "no face is seen" in refused(capsys, clip, "--check")


def test_help_tells_the_stages(capsys):
    with pytest.raises(SystemExit) as ended:
        process.main(["--help"])
    assert ended.value.code == 0 and "8 bundle_adjustment" in capsys.readouterr().out
