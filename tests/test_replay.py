"""What decides between plain and recorded drawing, with a stand-in for CUDA graphs (a GPU proves the graphs: speed.py)."""

import contextlib
import types

import pytest
import torch

from gaussian_renderer import replay


def inputs(value: float, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((count, 3), value), torch.full((count, 2, 2), value)


calls: list[torch.Tensor] = []


def draw(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    calls.append(a)
    return a + b[..., 0].sum(1, keepdim=True) / 2


@pytest.fixture
def recorded(monkeypatch):
    """A Replayed on a stand-in GPU: `state.full` says whether the lists overflowed, `state.error` what recording raises."""
    state = types.SimpleNamespace(full=False, error=None, drawer=None, replays=0)

    class Graph:
        def replay(self):
            state.replays += 1
            state.drawer._drawn.copy_(draw(*state.drawer._inputs))
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
    state.drawer._device = torch.device("cpu")  # where the stand-in's tensors are
    return state


def test_every_batch_is_drawn_with_its_own_inputs_and_all_but_the_first_by_replaying(recorded):
    for value in (1.0, 2.0, 3.0):
        assert (recorded.drawer(*inputs(value)) == 2 * value).all()
    assert recorded.replays == 2 and len(calls) == 2  # plainly, and to record


def test_a_last_batch_of_another_size_is_drawn_plainly(recorded):
    for value in (1.0, 2.0):
        recorded.drawer(*inputs(value))
    assert recorded.drawer(*inputs(5.0, count=1)).shape == (1, 3) and recorded.replays == 1


def test_a_batch_that_outgrows_the_recorded_lists_is_drawn_again_and_the_next_recorded_anew(recorded):
    for value in (1.0, 2.0):
        recorded.drawer(*inputs(value))
    recorded.full = True
    assert (recorded.drawer(*inputs(3.0)) == 6).all() and calls[-1][0, 0] == 3
    recorded.full = False
    before = len(calls)
    assert (recorded.drawer(*inputs(4.0)) == 8).all() and len(calls) == before + 1


def test_where_nothing_can_be_recorded_a_warning_says_so_and_drawing_goes_on(recorded):
    recorded.error = RuntimeError("operation not permitted")
    recorded.drawer(*inputs(1.0))
    with pytest.warns(RuntimeWarning, match=r"cannot be recorded .*operation not permitted"):
        assert (recorded.drawer(*inputs(2.0)) == 4).all()
    assert (recorded.drawer(*inputs(3.0)) == 6).all() and recorded.replays == 0
