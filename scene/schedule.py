"""What every iteration of a stage draws and how fast it learns: tables on the device, worked out before the stage begins.

A step reads its row by a counter that lives on the device too, so it needs nothing from the host; and since a row is a function
of seed and iteration alone, a resumed run goes on exactly.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scene.dataset import frame_order
from utils.distributed import Team


class Schedule:
    """The iterations `first` .. `end` - 1 of a stage, on the device of `team`; of the batch only our share."""

    def __init__(self, config, first: int, end: int, batch_size: int, weights: np.ndarray,
                 optimizer: torch.optim.Optimizer, team: Team):  # fmt: skip
        """`weights` (F,): how often each frame of the training set is drawn, relative to the others.

        Groups of the optimizer have `initial`, their first learning rate, and `final`, the factor it falls to, log-linearly.
        """
        self.first, groups = first, optimizer.param_groups
        steps = torch.arange(end - first, dtype=torch.float64) / max(end - first, 1)
        rates = torch.stack([group["initial"] * group["final"] ** steps for group in groups], 1)
        seed = config.seed + (first > 0)  # the stages draw different frames and colours
        plain = torch.rand(end - first, batch_size, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
        ramp = torch.arange(first, end) / config.iterations
        self.all_rows = frame_order(weights, batch_size, first, end, seed)  # (n, B) of the training set
        self.our_rows = team.share(self.all_rows)
        on = {"device": team.device}
        self._rows, self._plain = self.our_rows.to(**on), team.share(plain).to(**on)
        self._rates, self._ramp = rates.float().to(**on), ramp.to(**on)
        self.row = torch.zeros(1, dtype=torch.int64, **on)  # of the tables: iteration - first
        self.rates = torch.zeros(len(groups), **on)  # the learning rates of the optimizer are views of this
        for group, rate in zip(groups, self.rates.unbind(), strict=True):
            group["lr"] = rate

    def at(self, iteration: int) -> None:
        """The next step is this iteration."""
        self.row.fill_(iteration - self.first)

    def advance(self) -> None:
        self.row += 1

    def set_rates(self) -> None:
        self.rates.copy_(self._now(self._rates))

    @property
    def rows(self) -> Tensor:
        """(B,) frames of this step."""
        return self._now(self._rows)

    @property
    def plain(self) -> Tensor:
        """(B, 3, 1, 1) colour behind each frame, another one every time so that alpha cannot hide behind any."""
        return self._now(self._plain)

    @property
    def ramp(self) -> Tensor:
        """How far the training is, 0 to 1."""
        return self._now(self._ramp)

    def _now(self, table: Tensor) -> Tensor:
        return table.index_select(0, self.row)[0]
