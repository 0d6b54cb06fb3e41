"""What decides between plain and recorded drawing, with a stand-in for CUDA graphs (a GPU proves the graphs: speed.py)."""

import contextlib
import types

import pytest
import torch

from gaussian_renderer import replay
from scene.condition import Conditions


def conditions(value: float, count: int = 2) -> Conditions:
    return Conditions(*(torch.full((count, 3), value) for _ in range(5)))


calls: list[Conditions] = []


def draw(given: Conditions) -> types.SimpleNamespace:
    calls.append(given)
    return types.SimpleNamespace(rgb=given.view * 2)


@pytest.fixture
def recorded(monkeypatch):
    """A Replayed on a stand-in GPU: `state.full` says whether the lists overflowed, `state.error` what recording raises."""
    state = types.SimpleNamespace(full=False, error=None, drawer=None, replays=0)

    class Graph:
        def replay(self):
            state.replays += 1
            state.drawer._drawn.rgb.copy_(draw(state.drawer._inputs).rgb)
            calls.pop()

    @contextlib.contextmanager
    def graph(made, stream, capture_error_mode):
        yield
        if state.error:
            raise state.error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(replay, "graph_overflowed", lambda: state.full)
    calls.clear()
    state.drawer = replay.Replayed(draw, torch.device("cuda"))
    return state


def test_every_batch_is_drawn_with_its_own_conditions_and_all_but_the_first_by_replaying(recorded):
    for value in (1.0, 2.0, 3.0):
        assert (recorded.drawer(conditions(value)).rgb == 2 * value).all()
    assert recorded.replays == 2 and len(calls) == 2  # plainly, and to record


def test_a_last_batch_of_another_size_is_drawn_plainly(recorded):
    for value in (1.0, 2.0):
        recorded.drawer(conditions(value))
    assert recorded.drawer(conditions(5.0, count=1)).rgb.shape == (1, 3) and recorded.replays == 1


def test_a_batch_that_outgrows_the_recorded_lists_is_drawn_again_and_the_next_recorded_anew(recorded):
    for value in (1.0, 2.0):
        recorded.drawer(conditions(value))
    recorded.full = True
    assert (recorded.drawer(conditions(3.0)).rgb == 6).all() and calls[-1].view[0, 0] == 3
    recorded.full = False
    before = len(calls)
    assert (recorded.drawer(conditions(4.0)).rgb == 8).all() and len(calls) == before + 1


def test_where_nothing_can_be_recorded_a_warning_says_so_and_drawing_goes_on(recorded):
    recorded.error = RuntimeError("operation not permitted")
    recorded.drawer(conditions(1.0))
    with pytest.warns(RuntimeWarning, match=r"cannot be recorded .*operation not permitted"):
        assert (recorded.drawer(conditions(2.0)).rgb == 4).all()
    assert (recorded.drawer(conditions(3.0)).rgb == 6).all() and recorded.replays == 0
