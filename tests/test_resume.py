"""A run that goes on: with other settings, after a kill, from the end of the coarse stage."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import SMALL, run, same_weights
from tiny_dataset import write_tiny_dataset

import train
from scene import TalkingHead, load_avatar
from scene.gaussian_model import GaussianModel
from scene.talking_dataset_readers import TalkingDatasetReader
from utils.checkpoint import latest_checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("data set") / "tiny").root


def test_a_run_that_ends_in_the_coarse_stage_saves_the_head_it_trained_and_can_still_go_on(dataset, tmp_path):
    rates = ["--plane_lr", "0.05", "--network_lr", "0.01"]
    run(dataset, tmp_path / "m", "--iterations", "15", *rates)
    state = load_checkpoint(latest_checkpoint(tmp_path / "m"))["head"]
    for again in (False, True):  # the same command once more finds nothing left to do
        if again:
            run(dataset, tmp_path / "m", "--iterations", "15", *rates)
        saved = load_avatar(tmp_path / "m")
        trained = TalkingHead(saved.config, GaussianModel(0, len(saved.gaussians)))
        trained.load_state_dict(state)
        with torch.no_grad():
            seen, drawn = trained.canonical(), saved(TalkingDatasetReader(dataset).conditions([5]))
        assert (seen.opacity - trained.gaussians.values["opacity"]).abs().max() > 0.02
        for name in ("xyz", "opacity", "sh"):
            torch.testing.assert_close(getattr(drawn, name)[0], getattr(seen, name), msg=name)
    run(dataset, tmp_path / "m", *rates)
    run(dataset, tmp_path / "whole", *rates)
    same_weights(tmp_path / "m", tmp_path / "whole")


def test_the_loss_curve_of_a_killed_and_resumed_run_has_every_step(dataset, tmp_path):
    killed = """
import os, sys, train
step = train.Trainer.step
train.Trainer.step = lambda self: os._exit(9) if self.iteration == 14 else step(self)
train.main(sys.argv[1:])"""
    options = ["--log_interval", "1", "--iterations", "20"]
    for program, status in ((["-c", killed], 9), (["train.py"], 0)):  # TensorBoard sorts files by second and process
        command = [sys.executable, *program, "-s", dataset, "--model_path", tmp_path / "m", *SMALL, *options]
        assert subprocess.run([str(x) for x in command], cwd=ROOT, capture_output=True).returncode == status
    log = EventAccumulator(str(tmp_path / "m")).Reload()
    assert [e.step for e in log.Scalars("coarse/train_loss_patches/total_loss")] == list(range(1, 21))
    assert {10, 20} == {e.step for e in log.Scalars("coarse/held_out_psnr")}


def test_the_remedies_our_messages_name_can_be_resumed_with_and_are_said_in_one_line(dataset, tmp_path, capsys):
    run(dataset, tmp_path / "m", "--iterations", "30")
    grown = len(load_checkpoint(latest_checkpoint(tmp_path / "m"))["head"]["gaussians.gradient"])
    fewer = str(grown - 50)
    capsys.readouterr()
    run(dataset, tmp_path / "m", "--batch_size", "1", "--max_points", fewer, "--xyz_lr", "1e-6", "--log_interval", "1")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "other settings" in line]
    wanted = {"iterations 30 -> 40", "batch_size 2 -> 1", f"max_points 600 -> {fewer}", "xyz_lr 0.0004 -> 1e-06"}
    assert said.startswith("going on from iteration 30") and set(said.split(": ")[1].split(", ")) == wanted
    assert len(load_avatar(tmp_path / "m").gaussians) == grown - 50
    rates = {e.step: e.value for e in EventAccumulator(str(tmp_path / "m")).Reload().Scalars("fine/learning_rate/xyz")}
    assert rates[31] == pytest.approx(1e-6 * 0.01 ** (10 / 20))


def test_a_run_resumed_with_other_batches_draws_what_a_run_with_those_from_the_start_would(dataset, tmp_path, monkeypatch):
    drawn = {}

    def remember(self):
        drawn[name, self.iteration] = self.schedule.rows.tolist()
        step(self)

    step = train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", remember)
    for name, batch in (("start", "3"), ("m", "2"), ("m", "3")):
        more = ["--iterations", "30"] if batch == "2" else []
        run(dataset, tmp_path / name, "--batch_size", batch, *more)
    assert all(drawn["m", k] == drawn["start", k] for k in range(30, 40)) and drawn["m", 25] != drawn["start", 25]
