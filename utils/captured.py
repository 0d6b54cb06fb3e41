"""A step of training without the cost of launching it: on a GPU its kernels are recorded once and replayed as one CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from diff_surfel_rasterization import graph_overflowed


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own for everything inside, as recording asks for; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


def record(work: Callable[[], object], stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    """The kernels that `work` launches, as a graph; `stream`: where it is recorded, a stream of torch's own if None."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: the threads that decode pictures may pin memory meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph


class Captured:
    """Calls `step`; on a GPU, from the second call after `forget` on, as a CUDA graph. To be called on a `side_stream`.

    The first call settles what a recording cannot: the optimizer's moments, the sizes of the rasterizer's lists, libraries.
    `step` reads and writes the same tensors every time and decides nothing on the host. When something else changes, a tensor
    replaced or another branch taken, call `forget`; surfels that outgrow the rasterizer's recorded lists are noticed here.

    Several steps are called one after the other, a graph each, and `between` them, never recorded, what processes do together:
    NCCL wants all of them to record and replay alike, but surfels outgrow the lists in one process before they do in another.
    """

    def __init__(self, device: torch.device, *steps: Callable[[], None], between: Callable[[], None] = lambda: None):
        self._steps, self._between, self._on_gpu = steps, between, device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._warm = False

    def __call__(self) -> None:
        if self._graphs and graph_overflowed():
            self.forget()
        replays = self._on_gpu and self._warm
        records = replays and not self._graphs
        for k, step in enumerate(self._steps):
            if k:
                self._between()
            if records:
                self._graphs.append(record(step, torch.cuda.current_stream()))
            if replays:
                self._graphs[k].replay()
            else:
                step()
        self._warm = True
