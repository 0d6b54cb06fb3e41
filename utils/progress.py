"""Progress with rate and ETA for everything that takes longer than a few seconds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm


def progress(iterable: Iterable | None = None, *, label: str, total: int | None = None, unit: str = "frame",
             initial: int = 0) -> tqdm:  # fmt: skip
    """A tqdm bar with our look; on a pipe it prints at most every 10 s so that logs stay readable."""
    return tqdm(iterable, desc=label, total=total, unit=unit, initial=initial, dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 10.0, smoothing=0.05)  # fmt: skip


@contextlib.contextmanager
def solver_progress(label: str) -> Iterator[Callable[[float], None]]:
    """with solver_progress("face tracking") as each: each(cost) counts a step of a solver and shows its cost."""
    with progress(label=label, unit="step") as bar:

        def each(cost: float) -> None:
            bar.update()
            bar.set_postfix(cost=f"{cost:.0f}")

        yield each
