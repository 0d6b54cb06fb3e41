"""What settings and data sets make of training: recipes, priors, perceptual distances, and refusals in one sentence."""

import argparse
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import losses_of, run
from tiny_dataset import write_tiny_dataset

import arguments
import train
from scene import Scene, load_avatar
from scene.initial_points import initial_points
from scene.talking_dataset_readers import TalkingDatasetReader


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("data set") / "tiny").root


class MadeUpLpips(torch.nn.Module):
    """The interface of lpips.LPIPS over weights of no meaning."""

    def __init__(self, net, verbose):
        super().__init__()
        if net == "vgg":
            raise OSError("no route to host")
        self.layer = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x, y, normalize):
        assert normalize and x.shape == y.shape
        return (self.layer(x) - self.layer(y)).square().mean((1, 2, 3), keepdim=True)


def test_lpips_is_the_perceptual_distance_where_its_packages_are(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=MadeUpLpips))
    run(dataset, tmp_path / "m", "--lambda_perceptual", "0.1", "--perceptual_net", "lpips_alex", "--iterations", "4",
        "--log_interval", "1")  # fmt: skip
    log = EventAccumulator(str(tmp_path / "m")).Reload()
    values = [e.value for e in log.Scalars("coarse/train_loss_patches/perceptual")]
    assert len(values) == 4 and min(values) > 0


@pytest.mark.parametrize(("net", "module", "said"), [("alex", None, "needs the packages lpips and torchvision"),
                                                     ("vgg", SimpleNamespace(LPIPS=MadeUpLpips), "weights of LPIPS")])  # fmt: skip
def test_lpips_without_packages_or_weights_is_refused_with_the_remedy(dataset, tmp_path, monkeypatch, capsys, net, module, said):
    monkeypatch.setitem(sys.modules, "lpips", module)
    with pytest.raises(SystemExit):
        run(dataset, tmp_path / "m", "--lambda_perceptual", "0.1", "--perceptual_net", f"lpips_{net}")
    error = capsys.readouterr().err
    assert said in error and f"--perceptual_net {net}" in error and "Traceback" not in error


@pytest.mark.parametrize("text", ["nan nan\n" * 68, "1.5 2.5\n" * 60, "x y\n" * 68, ""])
def test_landmarks_that_are_not_68_points_are_refused_by_name(tmp_path, capsys, text):
    folder = write_tiny_dataset(tmp_path / "tiny")
    folder.landmarks(7).write_text(text)
    with pytest.raises(SystemExit):
        run(folder.root, tmp_path / "m")
    said = capsys.readouterr().err
    assert "7.lms does not hold 68 points" in said and said.count("\n") == 1


def test_speech_features_that_end_before_the_frames_are_refused_but_for_a_few_rows(tmp_path, capsys):
    folder = write_tiny_dataset(tmp_path / "tiny")
    features = np.load(folder.audio_features("mel"))
    np.save(folder.audio_features("mel"), features[:14])
    assert TalkingDatasetReader(folder.root).conditions([21]).audio.shape == (1, 16, 12)
    np.save(folder.audio_features("mel"), features[:13])
    with pytest.raises(SystemExit):
        run(folder.root, tmp_path / "m")
    said = capsys.readouterr().err
    assert "aud_mel.npy has 13 rows, but row 21 is wanted" in said and said.count("\n") == 1


def test_a_head_whose_surfels_vanish_is_one_sentence_with_the_iteration(dataset, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(dataset, tmp_path / "m", "--min_opacity", "0.9")
    said = capsys.readouterr().err
    assert "error: at iteration 10 almost every surfel" in said and "--opacity_lr" in said and "Traceback" not in said


@pytest.mark.parametrize("part", ["head", "all"])
def test_the_tri_plane_holds_all_that_is_modelled_without_any_seed_there(dataset, part):
    config = argparse.Namespace(source_path=str(dataset), part=part, seed_points=0, configs="arguments/faithful.py")
    scene = Scene(arguments.merge(config))
    head, wanted = scene.create_head(write=False), initial_points(scene.reader, part, 4000).points
    low, high = head.deformation.tri_plane.box
    assert len(head.gaussians) == 400 and (wanted > low).all() and (wanted < high).all()
    assert ((high - low) < 1.5 * (wanted.amax(0) - wanted.amin(0))).all()


def test_the_published_recipe_trains_both_stages(dataset, tmp_path):
    train.main(["-s", str(dataset), "--model_path", str(tmp_path / "m"), "--configs", str(ROOT / "arguments" / "faithful.py"),
                "--iterations", "5", "--coarse_iterations", "3", "--batch_size", "4", "--lambda_perceptual", "0", "--device", "cpu",
                "--log_interval", "1"])  # fmt: skip
    head, curve = load_avatar(tmp_path / "m"), losses_of(tmp_path / "m")
    assert list(curve) == [1, 2, 3, 4, 5] and np.isfinite(list(curve.values())).all() and curve[5] < curve[1]
    assert (len(head.gaussians), head.gaussians.sh_degree, head.deformation.attention[0].dropout.p) == (400, 3, 0.2)


@pytest.mark.parametrize(("name", "heavy"), [("normal", 5.0), ("distortion", 10_000.0)])
def test_the_priors_of_2dgs_are_logged_and_lower_what_they_measure_when_they_weigh_much(dataset, tmp_path, name, heavy):
    measured = {}
    for weight in (1e-6 * heavy, heavy):
        model = tmp_path / f"{weight}"
        run(dataset, model, f"--lambda_{name}", f"{weight}", "--log_interval", "1", "--scaling_lr", "0.02", "--rotation_lr", "0.02")
        log = EventAccumulator(str(model)).Reload()
        curves = [[e.value for e in log.Scalars(f"{stage}/train_loss_patches/{name}")] for stage in ("coarse", "fine")]
        assert [len(curve) for curve in curves] == [20, 20] and np.isfinite(curves).all() and np.all(curves)
        measured[weight] = np.mean(curves[1]) / weight
    assert measured[heavy] < 0.7 * measured[1e-6 * heavy]
