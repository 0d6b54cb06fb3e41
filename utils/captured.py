"""A step of training without the cost of launching it: on a GPU its kernels are recorded once and replayed as one CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch


def side_stream(device: torch.device) -> contextlib.AbstractContextManager:
    """A stream of its own for everything inside, as recording asks for; nothing on a CPU."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


class Captured:
    """Calls `step`; on a GPU, from the second call after `forget` on, as a CUDA graph. To be called on a `side_stream`.

    The first call settles what a recording cannot: the optimizer's moments, the sizes of the rasterizer's lists, libraries.
    `step` reads and writes the same tensors every time and decides nothing on the host. When something else changes, a tensor
    replaced or another branch taken, call `forget`.
    """

    def __init__(self, step: Callable[[], None], device: torch.device):
        self._step, self._on_gpu = step, device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self) -> None:
        if not (self._on_gpu and self._warm):
            self._step()
            self._warm = True
            return
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # thread_local: the threads that decode pictures may pin memory meanwhile
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._step()
            self._graph = graph
        self._graph.replay()
