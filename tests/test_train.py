"""train.py on a small data set: it learns, it can be killed, it says what is missing."""

import argparse
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_dataset import write_tiny_dataset

import arguments
import train
from gaussian_renderer import Rendering, render_batch
from scene import load_avatar
from scene.dataset import TrainingSet, frame_order, mouth_activity
from scene.talking_dataset_readers import TalkingDatasetReader
from utils import memory
from utils.checkpoint import latest_checkpoint, load_checkpoint
from utils.constants import CLOTH, PART_CLASSES
from utils.distributed import Team
from utils.errors import UserError
from utils.losses import image_losses

SMALL = ["--iterations", "40", "--coarse_iterations", "20", "--batch_size", "2", "--plane_resolution", "8", "--plane_channels", "8",
         "--net_width", "16", "--seed_points", "100", "--densify_from", "5", "--densify_until", "30", "--densify_interval", "10",
         "--checkpoint_interval", "10", "--lambda_perceptual", "0", "--sh_degree", "0", "--device", "cpu",
         "--max_points", "600"]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("data set") / "tiny").root


def run(dataset, model, *more):
    train.main(["-s", str(dataset), "--model_path", str(model), *SMALL, *more])


def same_weights(a, b):
    pair = [load_avatar(model) for model in (a, b)]
    for (name, x), y in zip(pair[0].state_dict().items(), pair[1].state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_training_writes_a_model_folder_that_loads_and_its_picture_gets_better(dataset, tmp_path):
    run(dataset, tmp_path / "m", "--iterations", "120", "--coarse_iterations", "60", "--xyz_lr", "1e-3", "--network_lr", "3e-3")
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"cfg_args", "input.ply", "cameras.json", "point_cloud", "chkpnt_120.pt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    head = load_avatar(tmp_path / "m")
    assert head.iteration == 120 and head.token_names == ("audio", "expression", "camera", "frame")
    reader = TalkingDatasetReader(dataset)
    batch = TrainingSet(reader, reader.splits["train"], "head").hold().batch(torch.arange(4))
    from gaussian_renderer import render_batch

    drawn = render_batch(head, batch.conditions, batch.image.shape[-1], batch.image.shape[-2], attention=True)
    error = ((drawn.rgb - batch.image / 255.0) * batch.mask).abs().sum() / batch.mask.sum() / 3
    assert error < 0.06
    assert (drawn.alpha - batch.mask.float()).abs().mean() < 0.06
    torch.testing.assert_close(drawn.attention.sum(1, keepdim=True), drawn.alpha, atol=1e-4, rtol=0)


def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_weights_bit_for_bit(dataset, tmp_path):
    run(dataset, tmp_path / "whole")
    for stop in (10, 30):  # one in each stage
        run(dataset, tmp_path / "cut", "--iterations", str(stop))
    (tmp_path / "cut" / "point_cloud").rename(tmp_path / "gone")
    # the decay within the fine stage depends on its length, so cut with the checkpoints of a whole run instead
    run(dataset, tmp_path / "again")
    latest_checkpoint(tmp_path / "again").unlink()
    run(dataset, tmp_path / "again")
    same_weights(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("features, deform", [("embedding", ["xyz", "opacity"]), ("both", ["scaling", "rotation", "sh"])])
def test_embeddings_grow_with_the_surfels_and_survive_resume_and_the_model_folder(dataset, tmp_path, features, deform):
    options = ["--surfel_features", features, "--deform", *deform]
    run(dataset, tmp_path / "m", *options)
    trained = latest_checkpoint(tmp_path / "m")
    state = load_checkpoint(trained)["head"]
    head = load_avatar(tmp_path / "m")
    assert head.gaussians.values["embedding"].shape == (len(head.gaussians), 16) and len(head.gaussians) > 500
    assert torch.equal(head.gaussians.values["embedding"], state["gaussians.values.embedding"])
    assert (head.deformation.tri_plane is None) == (features == "embedding")
    drawn = head(TalkingDatasetReader(dataset).conditions([0, 5]))
    for name in ("xyz", "scaling", "rotation", "opacity", "sh"):
        value = getattr(drawn, name)
        assert bool((value[0] != value[-1]).any()) == (name in deform), name
    trained.unlink()
    run(dataset, tmp_path / "m", *options)
    for name, value in load_checkpoint(trained)["head"].items():
        assert torch.equal(value, state[name]), name


def test_corrections_of_single_frames_are_resumed_exactly_and_no_rendering_uses_them(dataset, tmp_path):
    options = ["--pose_lr", "1e-3", "--exposure_lr", "1e-2", "--frame_code", "embedding", "--audio_window", "16", "--lambda_motion",
               "0.1"]  # fmt: skip
    run(dataset, tmp_path / "m", *options)
    trained = latest_checkpoint(tmp_path / "m")
    state = load_checkpoint(trained)["head"]
    assert state["corrections.pose"].abs().max() > 1e-4 and state["corrections.exposure"].abs().max() > 1e-4
    head, conditions = load_avatar(tmp_path / "m"), TalkingDatasetReader(dataset).conditions([0, 5])
    before = head(conditions).xyz
    head.corrections.pose.fill_(1.0)
    assert torch.equal(head(conditions).xyz, before)
    trained.unlink()
    run(dataset, tmp_path / "m", *options)
    for name, value in load_checkpoint(trained)["head"].items():
        assert torch.equal(value, state[name]), name


def test_the_perceptual_distance_comes_in_where_it_is_told_to_and_on_the_squares_it_is_told(dataset, tmp_path):
    options = ["--lambda_perceptual", "0.1", "--perceptual_on", "lips", "square", "--perceptual_side", "48", "--perceptual_from"]
    made = {}
    for start in ("26", "40"):
        run(dataset, tmp_path / start, *options, start, "--iterations", "30", "--lip_sampling", "1")
        made[start] = load_avatar(tmp_path / start).state_dict()
    run(dataset, tmp_path / "off", "--lambda_perceptual", "0", "--iterations", "30", "--lip_sampling", "1")
    off = load_avatar(tmp_path / "off").state_dict()
    assert all(torch.equal(value, off[name]) for name, value in made["40"].items())
    assert not torch.equal(made["26"]["gaussians.values.features_dc"], off["gaussians.values.features_dc"])


def test_killing_training_at_any_moment_loses_nothing_but_time(dataset, tmp_path):
    command = [sys.executable, "train.py", "-s", str(dataset), "--model_path", str(tmp_path / "killed"), *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and latest_checkpoint(tmp_path / "killed") is None:
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert latest_checkpoint(tmp_path / "killed") is not None
    run(dataset, tmp_path / "killed")
    run(dataset, tmp_path / "whole")
    same_weights(tmp_path / "killed", tmp_path / "whole")


def losses_of(model):
    """iteration -> total loss, as TensorBoard has it."""
    (events,) = model.glob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    return {e.step: e.value for stage in ("coarse", "fine") for e in log.Scalars(f"{stage}/train_loss_patches/total_loss")}


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_two_processes_learn_what_one_learns_from_the_same_batch_and_one_of_them_writes(dataset, tmp_path, device):
    options = ["--batch_size", "8", "--iterations", "20", "--coarse_iterations", "12", "--log_interval", "1", "--device", device,
               "--dropout", "0.2"]  # fmt: skip
    run(dataset, tmp_path / "one", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", "-s", dataset,
               "--model_path", tmp_path / "two", *SMALL, *options]  # fmt: skip
    done = subprocess.run([str(x) for x in command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 21))
    apart = {k: abs(one[k] - two[k]) for k in one}
    assert max(apart.values()) < 1e-4, apart
    a, b = load_avatar(tmp_path / "one"), load_avatar(tmp_path / "two")
    assert len(a.gaussians) == len(b.gaussians) > 480
    # not every weight: Adam gives one without a gradient, as the bias of the keys, a step in the direction of the rounding
    conditions = TalkingDatasetReader(dataset).conditions([0, 5])
    for name in ("xyz", "scaling", "opacity", "attention"):
        torch.testing.assert_close(getattr(a(conditions), name), getattr(b(conditions), name), atol=5e-3, rtol=1e-3, msg=name)


def test_a_batch_that_processes_cannot_share_evenly_is_refused(monkeypatch):
    team = Team("cpu")
    team.size = 2
    with pytest.raises(UserError, match="multiple of 8"):
        team.check_batch(coarse=1, fine=6)
    team.check_batch(coarse=2, fine=8)


def test_a_loss_that_is_no_number_stops_training_and_names_iteration_term_and_frames(dataset, tmp_path, monkeypatch, capsys):
    def broken(config, drawn, batch, *rest):
        terms = image_losses(config, drawn, batch, *rest)
        bad = (batch.conditions.frame == 7).any() & (drawn.surfels.attention is not None)
        return {n: value * torch.where(bad, torch.nan, 1.0) if n == "mask" else value for n, value in terms.items()}

    monkeypatch.setattr(train, "image_losses", broken)
    with pytest.raises(SystemExit) as stop:
        run(dataset, tmp_path / "m", "--log_interval", "7")
    said = capsys.readouterr().err.splitlines()[-1]
    iteration, frames = re.search(r"the mask loss is nan at iteration (\d+), frames \[(.*?)\]", said).groups()
    assert stop.value.code == 2 and 20 <= int(iteration) < 40 and "7" in frames.split(", ")
    checkpoint = latest_checkpoint(tmp_path / "m")
    assert load_checkpoint(checkpoint)["iteration"] <= int(iteration)
    assert all(value.isfinite().all() for value in load_checkpoint(checkpoint)["head"].values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_running_out_of_memory_says_what_to_lower_and_leaves_the_last_checkpoint(dataset, tmp_path, monkeypatch, capsys, error):
    step = train.Trainer.step

    def full(self):
        if self.iteration == 12:
            raise error
        step(self)

    monkeypatch.setattr(train.Trainer, "step", full)
    with pytest.raises(SystemExit) as stop:
        run(dataset, tmp_path / "m")
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and all(name in said for name in ("--batch_size", "--max_points", "--size"))
    assert load_checkpoint(latest_checkpoint(tmp_path / "m"))["iteration"] == 10


def test_a_run_that_cannot_fit_is_refused_before_it_begins(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: 50 << 20)
    with pytest.raises(SystemExit) as stop:
        run(dataset, tmp_path / "m", "--batch_size", "400")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "0.05 GiB" in said and "--batch_size" in said and latest_checkpoint(tmp_path / "m") is None


def test_tensorboard_shows_held_out_frames_beside_the_filmed_ones_and_where_surfels_attend(dataset, tmp_path):
    run(dataset, tmp_path / "m")
    (events,) = (tmp_path / "m").glob("events.out.tfevents*")
    tags = EventAccumulator(str(events)).Reload().Tags()
    assert {f"held_out/{name}" for name in ("render", "truth", "attention_audio", "attention_expression")} <= set(tags["images"])
    assert {"coarse/held_out_psnr", "fine/held_out_psnr", "fine/total_points", "fine/learning_rate/planes"} <= set(tags["scalars"])


def test_a_folder_that_is_no_data_set_is_refused_by_name(tmp_path):
    with pytest.raises(SystemExit) as stop:
        train.main(["-s", str(tmp_path / "nothing"), "--model_path", str(tmp_path / "m")])
    assert stop.value.code == 2 and not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "missing, stage", [("parsing", 3), ("transforms_train.json", 10), ("fused.ply", 7), ("bs.npy", 9), ("bc.jpg", 4)]
)
def test_a_missing_file_is_named_with_the_stage_that_makes_it(tmp_path, capsys, missing, stage):
    root = write_tiny_dataset(tmp_path / "tiny").root
    (root / missing).rename(tmp_path / "away")
    with pytest.raises(SystemExit) as stop:
        run(root, tmp_path / "m")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert missing in said and f"--task {stage}" in said and said.count("\n") == 1


def test_a_truncated_checkpoint_is_refused_by_name(dataset, tmp_path):
    run(dataset, tmp_path / "m", "--iterations", "10")
    path = latest_checkpoint(tmp_path / "m")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=path.name):
        load_checkpoint(path)


def test_a_model_with_truncated_weights_is_refused_by_name(dataset, tmp_path):
    run(dataset, tmp_path / "m", "--iterations", "10")
    path = next((tmp_path / "m").rglob("deformation.safetensors"))
    assert load_file(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="deformation.safetensors"):
        load_avatar(tmp_path / "m")


def test_resuming_with_other_settings_is_refused_and_names_them(dataset, tmp_path, capsys):
    run(dataset, tmp_path / "m", "--iterations", "10")
    for name, value in (("net_width", "24"), ("part", "all"), ("pose_lr", "1e-4"), ("coarse_iterations", "5")):
        with pytest.raises(SystemExit):
            run(dataset, tmp_path / "m", f"--{name}", value)
        assert f"{name} " in capsys.readouterr().err


def test_batches_depend_on_seed_and_iteration_alone_and_visit_every_frame():
    order = frame_order(np.ones(7), batch_size=3, first=0, end=7, seed=1)
    assert sorted(order.flatten().tolist()) == sorted(list(range(7)) * 3)
    assert torch.equal(frame_order(np.ones(7), 3, 4, 7, seed=1), order[4:])
    assert not torch.equal(frame_order(np.ones(7), 3, 0, 7, seed=2), order)


def test_a_frame_of_twice_the_weight_is_drawn_twice_as_often():
    weights = np.array([1.0, 2.0, 1.0, 1.0, 2.0, 1.0])
    drawn = frame_order(weights, batch_size=4, first=0, end=600, seed=0)
    counts = np.bincount(drawn.flatten(), minlength=6) / drawn.numel()
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.01)
    assert torch.equal(frame_order(weights, 4, 37, 600, seed=0), drawn[37:])


def test_a_wide_or_fast_mouth_counts_more_than_a_shut_one():
    landmarks = np.random.default_rng(0).normal(100, 20, (40, 68, 2)).repeat(2, 0)[:40]
    landmarks[:] = landmarks[0]
    gap = np.zeros(40)
    gap[10:20], gap[30:40] = 20, np.arange(10) % 4 * 5  # open, then chattering
    for low in (67, 66, 65):
        landmarks[:, low] = landmarks[:, 128 - low] + np.stack([np.zeros(40), gap], 1)
    activity = mouth_activity(landmarks)
    assert activity[5] == 0 and activity[14] == 0.5 and activity[31:39].mean() > 0.4 and activity.max() <= 1


def test_rare_blinks_are_drawn_as_often_as_told_and_common_ones_as_often_as_they_are(dataset):
    reader = TalkingDatasetReader(dataset)
    data = TrainingSet(reader, reader.splits["train"], "head")
    data.shut[:] = False
    data.shut[3] = True
    weights = data.weights(0.0, 0.25)
    assert weights[3] / weights.sum() == pytest.approx(0.25) and set(np.delete(weights, 3)) == {1.0}
    weights = data.weights(1.0, 0.25)  # together with lips
    assert weights[3] / weights.sum() == pytest.approx(0.25)
    np.testing.assert_allclose(np.delete(weights, 3), 1 + np.delete(data.mouth, 3))
    assert set(data.weights(0.0, 0.5 / len(data))) == {1.0}
    data.shut[3] = False
    assert set(data.weights(0.0, 0.25)) == {1.0}


def test_the_eyes_of_frames_that_show_them_shut_weigh_more_and_nothing_else_does(dataset):
    reader = TalkingDatasetReader(dataset)
    data = TrainingSet(reader, reader.splits["train"], "head")
    data.shut[:] = False
    data.shut[3] = True
    w, h = data.window.width, data.window.height
    black = Rendering(torch.zeros(1, 3, h, w), torch.zeros(1, 1, h, w), None, None, None)

    def terms(row, weight):
        config = arguments.merge(argparse.Namespace(blink_weight=weight, lambda_eyes=0.2))
        return image_losses(config, black, data.hold().batch(torch.tensor([row])), torch.zeros(1, 3, 1, 1), None)

    for row in (3, 4):
        light, heavy = terms(row, 1.0), terms(row, 4.0)
        assert light["eyes"] > 0
        for name in light:
            factor = 4 if (row, name) == (3, "eyes") else 1
            torch.testing.assert_close(heavy[name], factor * light[name], msg=name)


def test_frames_decoded_ahead_are_those_held_in_memory(dataset):
    reader = TalkingDatasetReader(dataset)
    ids = reader.splits["train"]
    held, streamed = TrainingSet(reader, ids, "head").hold(), TrainingSet(reader, ids, "head")
    order = frame_order(np.ones(len(ids)), 3, 0, 6, seed=0)
    for k in streamed.fed(order, 0, 2, 6):
        a, b = held.batch(order[k]), streamed.batch(order[k])
        for name in ("image", "classes", "mask", "lips", "eyes"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_the_training_window_holds_the_whole_part_and_its_cameras_agree(dataset):
    reader = TalkingDatasetReader(dataset)
    data = TrainingSet(reader, reader.splits["train"], "head").hold()
    w, first = data.window, data.ids[:1]
    batch = data.batch(torch.tensor([0]))
    assert batch.mask.sum() == data.is_part[reader.parsing(first[0])].sum()
    assert torch.equal(batch.image[0].permute(1, 2, 0), torch.from_numpy(w.cut(reader.image(first[0]))))
    assert torch.equal(batch.classes[0, 0], torch.from_numpy(w.cut(reader.parsing(first[0])).copy()))
    shift = reader.conditions(first).intrinsics - batch.conditions.intrinsics
    assert shift[0, 0, 2] == w.x and shift[0, 1, 2] == w.y


@pytest.mark.parametrize("part", ["face", "all"])
def test_every_part_trains_on_its_own_classes_and_is_drawn(dataset, tmp_path, part):
    run(dataset, tmp_path / part, "--part", part, "--iterations", "60", "--coarse_iterations", "50")
    reader, head = TalkingDatasetReader(dataset), load_avatar(tmp_path / part)
    data = TrainingSet(reader, reader.splits["train"], part).hold()
    batch = data.batch(torch.arange(2))
    assert np.isin(batch.classes[batch.mask], PART_CLASSES[part]).all()
    assert bool((batch.classes[batch.mask] == CLOTH).any()) == (part == "all")
    drawn = render_batch(head, batch.conditions, data.window.width, data.window.height)
    assert drawn.alpha[batch.mask].mean() > drawn.alpha[~batch.mask].mean() + 0.4
    assert (drawn.surfels.xyz[0].amin(0) >= head.deformation.tri_plane.box[0] - 0.2).all()  # the box holds what is modelled


def test_training_and_its_benchmarks_need_neither_pyav_nor_mediapipe():
    """A machine lent for its GPU may have neither."""
    code = ("import sys; sys.modules |= {'av': None, 'mediapipe': None}; sys.path.insert(0, '.'); "
            "import train, benchmarks.train, benchmarks.search")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
