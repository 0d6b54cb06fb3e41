"""utils/captured.py: what is called, recorded and replayed when. A stand-in plays the graph, so that no GPU is needed."""

import pytest
import torch

from utils import captured


class Graph:
    """A recording that says when it is replayed."""

    def __init__(self, said, name):
        self.replay = lambda: said.append(f"replay {name}")


@pytest.fixture()
def said(monkeypatch):
    """What happened, in order. `said.overflowed` is what the rasterizer answers."""

    class Said(list):
        overflowed = False

    said = Said()

    def record(step, stream):
        said.append("record")
        step()
        return Graph(said, said.pop())

    monkeypatch.setattr(captured, "record", record)
    monkeypatch.setattr(captured, "graph_overflowed", lambda: said.overflowed)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return said


def halves(said, device):
    steps = (lambda: said.append("learn"), lambda: said.append("update"))
    return captured.Captured(torch.device(device), *steps, between=lambda: said.append("average"))


def took(said, call):
    said.clear()
    call()
    return list(said)


PLAINLY = ["learn", "average", "update"]
REPLAYED = ["replay learn", "average", "replay update"]
RECORDED = ["record", "replay learn", "average", "record", "replay update"]


def test_on_a_cpu_every_step_is_called_plainly(said):
    call = halves(said, "cpu")
    assert [took(said, call) for _ in range(3)] == [PLAINLY] * 3


def test_the_first_call_is_plain_the_second_recorded_and_what_processes_do_together_is_never_part_of_a_graph(said):
    call = halves(said, "cuda")
    assert [took(said, call) for _ in range(4)] == [PLAINLY, RECORDED, REPLAYED, REPLAYED]


def test_both_halves_are_recorded_anew_when_surfels_outgrow_the_recorded_lists(said):
    call = halves(said, "cuda")
    call(), call()
    said.overflowed = True
    assert took(said, call) == PLAINLY
    said.overflowed = False
    assert [took(said, call) for _ in range(2)] == [RECORDED, REPLAYED]


def test_a_step_alone_is_one_graph(said):
    call = captured.Captured(torch.device("cuda"), lambda: said.append("step"))
    assert [took(said, call) for _ in range(3)] == [["step"], ["record", "replay step"], ["replay step"]]
