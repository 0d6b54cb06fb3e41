"""Weights of others are loaded to the last tensor or refused in one sentence, and nothing in a file is executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from data_utils.face_parsing import bisenet
from data_utils.optical_flow import raft
from utils.errors import UserError
from utils.speech import ave

NETWORKS = {  # what makes it, what loads it from a path, a tensor of it
    "bisenet": (bisenet.BiSeNetNetwork, bisenet.load_network, "cp.arm16.conv_atten.weight"),
    "raft_small": (raft.RaftSmall, lambda path: raft.load_network(path, "raft_small"), "update_block.gru.convz.weight"),
    "unfaceflow": (raft.RaftSmall, lambda path: raft.load_network(path, "unfaceflow"), "fnet.conv1.bias"),
    "ave": (ave.make_network, ave.load_network, "3.conv_block.1.running_var"),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    """(name, a state dict of exactly the documented names and shapes, load from a path, name of one tensor)."""
    make, load, tensor = NETWORKS[request.param]
    torch.manual_seed(1)
    return request.param, make().state_dict(), load, tensor


def refusal(load, path: Path) -> str:
    with pytest.raises(UserError) as error:
        load(path)
    text = str(error.value)
    assert str(path) in text and "\n" not in text and "http" in text, "one sentence with the file and the remedy"
    return text


def test_weights_of_the_documented_names_and_shapes_are_loaded(network, tmp_path):
    _, state, load, tensor = network
    torch.save(state, tmp_path / "weights.pth")
    loaded = load(tmp_path / "weights.pth")
    assert torch.equal(loaded.state_dict()[tensor], state[tensor]) and not loaded.training
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # as torch wrote before 1.6
    assert torch.equal(load(tmp_path / "old.pth").state_dict()[tensor], state[tensor])
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "older.pth")  # before 0.4.1
    assert torch.equal(load(tmp_path / "older.pth").state_dict()[tensor], state[tensor])


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named(network, tmp_path):
    name, state, load, tensor = network
    path = tmp_path / "weights.pth"
    torch.save({k: v for k, v in state.items() if k != tensor}, path)
    assert f"does not fit {name}: 1 of its tensors is missing (first {tensor})" in refusal(load, path)
    torch.save(state | {"classifier.weight": torch.zeros(3)}, path)
    assert "1 of its tensors is unknown (first classifier.weight)" in refusal(load, path)
    torch.save(state | {tensor: torch.zeros(5, 7)}, path)
    assert f"{tensor} is 5 x 7 where " in refusal(load, path)
    torch.save(state | {tensor: torch.full_like(state[tensor], float("nan"))}, path)
    assert f"{tensor} holds numbers that are not finite" in refusal(load, path)


def test_another_network_and_what_is_no_network_are_refused(network, tmp_path):
    name, _, load, _ = network
    path = tmp_path / "weights.pth"
    torch.save(NETWORKS["ave" if name != "ave" else "bisenet"][0]().state_dict(), path)
    assert "are missing (first " in refusal(load, path)
    for other in ([1, 2, 3], {"epoch": 7}, "weights"):
        torch.save(other, path)
        assert "are missing" in refusal(load, path)


def test_truncated_files_and_web_pages_are_refused(network, tmp_path):
    _, state, load, _ = network
    path = tmp_path / "weights.pth"
    for new in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=new)
        whole = path.read_bytes()
        for size in (0, 40, len(whole) // 2, len(whole) - 100):
            path.write_bytes(whole[:size])
            assert "is cut short or no file of torch" in refusal(load, path)
    path.write_bytes(b"<!doctype html><title>404</title>" * 100)
    assert "is cut short or no file of torch" in refusal(load, path)


class Malice:
    """Its pickle creates a file when it is read as pickles are."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_weights_is_not_executed(network, tmp_path):
    _, state, load, _ = network
    path, trap = tmp_path / "weights.pth", tmp_path / "trap"
    for new in (True, False):
        torch.save(state | {"extra": Malice(trap)}, path, _use_new_zipfile_serialization=new)
        text = refusal(load, path)
        assert "holds code (" in text and "mkdir), which was not run" in text
    path.write_bytes(pickle.dumps(Malice(trap)))
    refusal(load, path)
    assert not trap.exists()


@pytest.mark.parametrize("wrap", [
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {f"net_C.{k}": v for k, v in s.items()} | {"net_W.conv.weight": torch.zeros(16, 2, 3, 3)},
    lambda s: {"net_C": {f"module.{k}": v for k, v in s.items()}, "net_W": {"conv.weight": torch.zeros(16)}, "epoch": 19008},
])  # fmt: skip
def test_raft_is_found_in_the_layouts_of_raft_small_and_unfaceflow(wrap, tmp_path):
    state = raft.RaftSmall().state_dict()
    assert len(state) == 106 and sum(v.numel() for v in state.values()) == 990162
    torch.save(wrap(state), tmp_path / "flow.pth")
    loaded = raft.load_network(tmp_path / "flow.pth", "unfaceflow").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_ave_is_found_with_and_without_its_prefix(tmp_path):
    state = ave.make_network().state_dict()
    torch.save({f"audio_encoder.{k}": v for k, v in state.items()}, tmp_path / "ave.pth")
    assert torch.equal(ave.load_network(tmp_path / "ave.pth").state_dict()["12.conv_block.0.bias"], state["12.conv_block.0.bias"])
