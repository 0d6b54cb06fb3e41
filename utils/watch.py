"""The first step whose loss or gradient is no number: noticed on the device, asked for when the host has time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError


class Watch:
    """Keeps counter and values of the first step with a NaN or an infinity among its values; looking waits for nothing."""

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names = names
        self.bad = torch.zeros((), device=device)  # 1 from that step on
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._values = torch.zeros(len(names), device=device)

    def look(self, row: Tensor, values: Tensor) -> None:
        """At the values (len(names),) of the step that the counter `row` (1,) stands at."""
        now = ~values.isfinite().all()
        first = now & (self.bad == 0)
        self._row.copy_(torch.where(first, row, self._row))
        self._values.copy_(torch.where(first, values, self._values))
        self.bad.copy_((now | (self.bad > 0)).float())

    def check(self, first: int, frames: Callable[[int], list[int]], model_path: Path) -> None:
        """Raises UserError if there was such a step; waits for the device. Counter 0 is iteration `first`, and `frames(counter)`
        are the ids that a step saw."""
        if not float(self.bad):
            return
        row, wrong = int(self._row), int((~self._values.isfinite()).nonzero()[0])
        what = self.names[wrong] if self.names[wrong] == "gradient" else f"{self.names[wrong]} loss"
        raise UserError(f"the {what} is {float(self._values[wrong])} at iteration {first + row}, frames {frames(row)}; the last "
                        f"checkpoint in {model_path} is intact: lower the learning rates and resume")  # fmt: skip
