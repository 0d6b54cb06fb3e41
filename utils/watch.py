"""The first step whose loss is no number: noticed on the device, asked for when the host has time."""

from __future__ import annotations

import torch
from torch import Tensor


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

    def found(self) -> tuple[int, str, float] | None:
        """(counter, name, value) of the first NaN or infinity, or None. Waits for the device."""
        if not float(self.bad):
            return None
        wrong = int((~self._values.isfinite()).nonzero()[0])
        return int(self._row), self.names[wrong], float(self._values[wrong])
