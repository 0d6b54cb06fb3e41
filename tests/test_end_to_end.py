"""The product on a machine with nothing: synthetic clip -> data set -> head -> new speech, through the real programs."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from lineage_folder import read_as_lineage

from benchmarks.demo import pose_errors
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.audio import load_audio
from utils.constants import HEAD_CLASSES
from utils.files import read_json
from utils.image import read_parsing
from utils.video import read_frames

SMALL = (
    "--configs arguments/fast.py --iterations 1700 --coarse_iterations 150 --densify_from 50 --densify_until 300 "
    "--densify_interval 50 --batch_size 2 --seed_points 2000 --max_points 6000"
).split()


def program(*command) -> str:
    """Run one of the programs as a user would; its output, or a failure that shows it."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A 6-second clip at 128 pixels, made, processed, trained for a minute, its held-out frames and a new speech rendered."""
    root = tmp_path_factory.mktemp("the demo")
    data, model = root / "data" / "demo", root / "model"  # a video in data/<name>/ is processed where it lies
    program("data_utils/make_demo.py", "--out", data, "--seconds", 6, "--size", 128)
    program("data_utils/process.py", data / "demo.mp4", "--size", 128)
    program("train.py", "-s", data, "--model_path", model, *SMALL)
    program("render.py", "--model_path", model, "--skip_train")
    program("metrics.py", "--model_path", model)
    program("render.py", "--model_path", model, "--custom_aud", data / "speech.wav")
    return data, model


def test_a_speech_that_was_never_heard_becomes_a_video_with_exactly_its_sound(demo):
    data, model = demo
    (video,) = (model / "custom").rglob("*_speech_*_renders.mp4")
    speech, sound = load_audio(data / "speech.wav"), load_audio(video)
    assert sum(1 for _ in read_frames(video)) == len(speech) // 640
    n = min(len(speech), len(sound))
    assert abs(len(speech) - len(sound)) < 2048
    assert np.corrcoef(speech[:n], sound[:n])[0, 1] > 0.98


def test_the_data_set_is_read_by_a_reader_of_the_lineage(demo):
    """SyncTalk's, ER-NeRF's and GaussianTalker's formats, through OpenCV as they do."""
    data, _ = demo
    clip = read_as_lineage(data)
    assert len(clip["frames"]) == 150 and clip["train"] == list(range(136)) and (clip["width"], clip["height"]) == (128, 128)
    truth = np.load(data / "truth" / "truth.npz")
    for i in (0, 70, 149):
        frame = clip["frames"][i]
        head = read_parsing(data / "truth" / "masks" / f"{i}.png")
        head = cv2.resize(np.isin(head, HEAD_CLASSES).astype(np.uint8), (128, 128), interpolation=cv2.INTER_AREA) > 0
        assert (frame["head"] & head).sum() > 0.8 * (frame["head"] | head).sum()
        assert 0.3 < frame["distance"] < 1.5  # metres
        assert frame["torso"][-1, 64, 3] == 255 and frame["torso"][0, 64, 3] == 0 and frame["audio"].shape[0] == 8
    blinks = np.array([clip["frames"][i]["blink"].mean() for i in range(150)])
    assert np.corrcoef(blinks, truth["blink"][:150])[0, 1] > 0.8


def test_the_estimated_pose_is_the_true_one(demo):
    data, _ = demo
    reader, truth = TalkingDatasetReader(data), np.load(data / "truth" / "truth.npz")
    true = (torch.from_numpy(truth[name])[reader.ids] for name in ("euler", "trans"))
    angle, distance = pose_errors(reader.views[reader.ids], *true)
    assert angle.square().mean().sqrt() < 1.2 and angle.max() < 2.5  # degrees; 0.86 and 1.47 at this small size
    assert distance.square().mean().sqrt() < 0.01  # of the distance; 0.004


def test_the_face_tracking_can_be_looked_at(demo):
    data, _ = demo
    program("data_utils/face_tracking/test_3dmm_proj.py", "--path", data)  # a path with a space
    frames = list(read_frames(data / "3dmm_render.mp4"))
    assert len(frames) == 150 and frames[0].shape == (248, 128, 3)
    green = [(frame[:128, :, 1].astype(int) - frame[:128, :, 0]).max() for frame in frames[::25]]
    assert min(green) > 60  # the mesh


def test_held_out_frames_look_like_the_filmed_ones_and_their_lips_move_with_them(demo):
    _, model = demo
    (result,) = read_json(model / "results.json").values()
    assert result["PSNR_head"] > 24 and result["PSNR"] > 28 and result["FacesFound"] > 0.9
    assert result["LipCorrelation"] > 0.4 and abs(result["LipLag"]) <= 1


def test_running_the_commands_again_does_no_work_twice(demo):
    data, model = demo
    before = {path: path.stat().st_mtime_ns for path in (data / "ori_imgs").iterdir()}
    said = program("data_utils/process.py", data / "demo.mp4", "--size", 128)
    assert "up to date" in said
    assert before == {path: path.stat().st_mtime_ns for path in (data / "ori_imgs").iterdir()}
    trained = (model / "point_cloud" / "iteration_1700" / "point_cloud.ply").read_bytes()
    program("train.py", "-s", data, "--model_path", model, *SMALL)
    assert (model / "point_cloud" / "iteration_1700" / "point_cloud.ply").read_bytes() == trained
