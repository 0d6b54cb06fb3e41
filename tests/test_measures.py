"""What benchmarks/ measures on a trained head: where tokens attend, what flickers, and what copying frames would give."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import SMALL
from tiny_dataset import write_tiny_dataset

sys.path.insert(0, str(ROOT / "benchmarks"))
import attention
import baseline
import flicker

import train
from gaussian_renderer.paste import Backdrops
from scene import load_avatar
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.files import read_json
from utils.image import read_rgb


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("measured") / "tiny").root


@pytest.fixture(scope="module")
def model(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    train.main(["-s", str(dataset), "--model_path", str(path), *SMALL, "--frame_code", "embedding", "--lambda_attention", "1"])
    return path


def test_attention_is_measured_where_it_is_drawn(dataset, model):
    table = attention.measure(model, 5, torch.device("cpu"))
    assert set(table) == {"audio", "expression", "camera", "frame"}
    for region in ("lower face", "outside it", "eyes and brows", "outside them"):
        assert sum(of[region] for of in table.values()) == pytest.approx(1, abs=1e-3)  # softmax over the tokens


def test_regions_follow_the_landmarks_and_stay_within_the_head():
    classes, landmarks = np.ones((100, 100), np.uint8), np.zeros((68, 2))
    classes[:, 80:] = 0
    landmarks[30] = 50, 60
    for brow, eye, x in ((slice(17, 22), slice(36, 42), 20), (slice(22, 27), slice(42, 48), 60)):
        landmarks[brow] = np.stack([np.linspace(x, x + 20, 5), np.full(5, 30)], 1)
        landmarks[eye] = np.stack([np.linspace(x + 2, x + 18, 6), np.full(6, 40)], 1)
    found = attention.regions(classes, landmarks)
    assert not found["lower face"][:61].any() and found["lower face"][61:, :80].all()
    assert found["eyes and brows"][30:41, 20:41].all() and not found["eyes and brows"][50:].any()
    assert not found["eyes and brows"][:, 80:].any() and not found["outside them"][:, 80:].any()
    assert (found["eyes and brows"] ^ found["outside them"])[:, :80].all()


def test_a_code_that_changes_every_frame_flickers_and_held_it_does_not(dataset, model, capsys):
    flicker.main(["-m", str(model), "--seconds", "0.2", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "held still: " in said and "dB lost on training frames" in said
    frames = [torch.full((3, 8, 8), value) for value in (0.0, 0.1, 0.05)]
    assert flicker.change(frames, [np.ones((8, 8), bool)] * 3) == pytest.approx(0.075 * 255, rel=1e-4)


def test_with_the_pose_held_a_head_that_only_turns_does_not_flicker(dataset, model, monkeypatch):
    reader, device = TalkingDatasetReader(dataset), torch.device("cpu")
    filmed, ids = reader.conditions, reader.splits["train"][:4]
    monkeypatch.setattr(reader, "conditions", lambda of: dataclasses.replace(filmed(ids[:1]), view=filmed(of).view))
    masks = [np.ones((reader.height, reader.width), bool)] * len(ids)
    turning, held = (flicker.change(flicker.pictures(load_avatar(model, device=device), reader, ids, device, pose), masks)
                     for pose in (None, ids[2]))  # fmt: skip
    assert turning > 0 and held == 0


def test_the_stillest_stretch_is_consecutive_and_the_pose_rests_in_it(dataset):
    reader = TalkingDatasetReader(dataset)
    reader.views[10:14] = reader.views[10]
    assert flicker.stillest(reader, 4) == [10, 11, 12, 13]
    assert 3 not in flicker.stillest(reader, 6)  # not usable


@pytest.mark.parametrize("paste", ["headless", "none"])
def test_the_baseline_pastes_the_training_frame_nearest_in_pose_and_sound(dataset, tmp_path, paste):
    reader = TalkingDatasetReader(dataset)
    i, j = reader.splits["val"][0], reader.splits["train"][4]
    reader.views[i], reader.audio[i - 1 : i + 2] = reader.views[j], reader.audio[j - 1 : j + 2]
    assert baseline.nearest_frames(reader)[0] == j
    baseline.main(["-s", str(dataset), "-m", str(tmp_path / "nearest"), "--paste", paste])
    folder = tmp_path / "nearest" / "test" / "ours_0"
    facts, chosen = read_json(folder / "frames.json"), baseline.nearest_frames(TalkingDatasetReader(dataset))
    picture = read_rgb(folder / "renders" / "00000.png")
    head = np.isin(reader.parsing(chosen[0]), (1, 11, 17))
    assert (picture[head] == reader.image(chosen[0])[head]).all() and facts["ids"] == reader.splits["val"]
    behind = Backdrops(reader, "head", paste)[facts["ids"][0]]
    np.testing.assert_array_equal(picture[~head], behind[~head])
    assert facts["paste"] == paste
