"""What training says of its memory before it takes it."""

import argparse

import pytest
import torch

import arguments
from utils import memory
from utils.memory import GIB, PROGRAM
from utils.perceptual import PerceptualLoss, _alex_slices, _Network, _vgg_slices

CPU = torch.device("cpu")


def config(**settings):
    return arguments.merge(argparse.Namespace(max_points=12_000, **settings))


def said(capsys, **settings) -> float:
    """GiB that the printed line names for a batch of 16 windows of 432 x 496."""
    memory.plan(config(**settings), 16, 432 * 496, 0, CPU, True)
    return float(capsys.readouterr().out.split("about ")[1].split(" GiB on cpu")[0])


def test_the_printed_line_counts_the_features_of_the_network_that_compares_the_pictures(capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * GIB)
    off = said(capsys, lambda_perceptual=0.0)
    for net, bytes_a_pixel in (("alex", 370), ("vgg", 4100)):
        for views, pixels in ((("window",), 432 * 496), (("lips", "square"), 2 * 64**2)):
            more = said(capsys, perceptual_net=net, perceptual_on=views) - off
            assert more == pytest.approx(16 * pixels * bytes_a_pixel / GIB, abs=0.11), (net, views)


@pytest.mark.parametrize(("net", "slices"), [("alex", _alex_slices), ("vgg", _vgg_slices)])
def test_the_features_take_what_is_counted_for_them(tmp_path, net, slices):
    torch.save({name: torch.ones_like(value) for name, value in _Network(slices()).state_dict().items()}, tmp_path / "made.pth")
    loss, kept, side = PerceptualLoss(net, tmp_path / "made.pth"), {}, 192
    weights = {value.untyped_storage().data_ptr() for value in loss.state_dict().values()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.rand(1, 3, side, side, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = loss(x, x.detach())
    taken = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)
    assert taken / side**2 == pytest.approx(memory.PERCEPTUAL[net][0], rel=0.06)


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [("0::/", ".", ("memory.max", "memory.current", "inactive_file")),
     ("0::/jobs/7/step", "jobs/7", ("memory.max", "memory.current", "inactive_file")),
     ("5:devices:/\n4:cpu,memory:/docker/1a", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))],
)  # fmt: skip
def test_the_limit_of_a_container_or_a_job_counts_as_the_free_memory(tmp_path, monkeypatch, own, folder, names):
    limit, taken, cache = names
    where = tmp_path / "cgroup" / folder
    (tmp_path / "cgroup" / "jobs" / "7" / "step").mkdir(parents=True)
    where.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cgroup" / "jobs" / "7" / "step" / "memory.max").write_text("max\n")
    (where / limit).write_text(f"{3 * GIB}\n")
    (where / taken).write_text(f"{2 * GIB}\n")
    (where / "memory.stat").write_text(f"anon 7\n{cache} {GIB // 2}\n")
    (tmp_path / "own").write_text(own + "\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_machine_memory", lambda: 60 * GIB)
    assert memory.free_memory(CPU) == 1.5 * GIB
    (where / limit).write_text(f"{10**6 * GIB}\n")
    assert memory.free_memory(CPU) == 60 * GIB
    assert memory.step_bytes(config(lambda_perceptual=0.0), 1, 64, CPU) + PROGRAM < GIB
