"""Drawing without the cost of launching it: on a GPU the kernels of a batch are recorded once and replayed as one CUDA graph.

A frame alone takes longer to launch from Python than a GPU takes to draw it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diff_surfel_rasterization import graph_overflowed
from torch import Tensor

from utils.captured import record


class Replayed:
    """`draw` (tensors -> whatever it makes of them) of batches of one size. What a call returns is overwritten by the next.

    Inputs come from any device. The first batch settles the sizes of the rasterizer's lists and is drawn plainly, like batches of
    another size (a clip's last), batches whose surfels outgrow the recorded lists, and all on a CPU. Waits until a replayed batch
    is drawn: only then is it known that the lists were long enough.
    """

    def __init__(self, draw: Callable[..., Any], device: torch.device):
        self._draw, self._device = draw, device
        self._records = device.type == "cuda"
        self._size: list[torch.Size] | None = None  # of the inputs
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        size = [x.shape for x in inputs]
        first, self._size = self._size is None, self._size or size
        if first or not self._records or size != self._size:
            return self._plainly(inputs)
        if self._graph is None and not self._record(inputs):
            return self._plainly(inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        self._graph.replay()
        torch.cuda.current_stream(self._device).synchronize()
        if graph_overflowed():
            self._graph = None
            return self._plainly(inputs)
        return self._drawn

    def _plainly(self, inputs: tuple[Tensor, ...]) -> Any:
        return self._draw(*(x.to(self._device) for x in inputs))

    def _record(self, inputs: tuple[Tensor, ...]) -> bool:
        self._inputs = [x.to(self._device, copy=True) for x in inputs]
        try:
            self._graph = record(self._draw_inputs)
        except RuntimeError as error:
            warnings.warn(f"drawing cannot be recorded as a CUDA graph here ({error}); it goes on, launched kernel by kernel, more "
                          "slowly where few frames are drawn at once", RuntimeWarning, stacklevel=3)  # fmt: skip
            self._records = False
        return self._records

    def _draw_inputs(self) -> None:
        self._drawn = self._draw(*self._inputs)
