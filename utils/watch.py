"""The first step whose loss is no number: noticed on the device, asked for when the host has time."""

from __future__ import annotations

import torch
from torch import Tensor


class Watch:
    """Keeps counter and terms of the first step with a NaN or an infinity in a term; looking at a step waits for nothing."""

    def __init__(self, terms: int, device: torch.device):
        self._row = torch.full((1,), -1, dtype=torch.int64, device=device)
        self._terms = torch.zeros(terms, device=device)

    def look(self, row: Tensor, terms: Tensor) -> None:
        """At the terms (T,) of the step that the counter `row` (1,) stands at."""
        first = (self._row < 0) & ~terms.isfinite().all()
        self._row.copy_(torch.where(first, row, self._row))
        self._terms.copy_(torch.where(first, terms, self._terms))

    def found(self) -> tuple[int, list[float]] | None:
        """(counter, terms) of the first bad step, or None. Waits for the device."""
        row = int(self._row)
        return (row, self._terms.tolist()) if row >= 0 else None
