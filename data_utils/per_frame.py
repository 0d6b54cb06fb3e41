"""Work done frame by frame: over a few threads, in order, skipping what an interrupted run has already finished."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
_ENDS = {".png": b"IEND\xaeB`\x82", ".jpg": b"\xff\xd9"}  # the last bytes of a whole file


def is_whole(path: Path) -> bool:
    """True if the PNG or JPEG exists and was written to its end (a cheap check of the last bytes)."""
    end = _ENDS[path.suffix]
    try:
        with open(path, "rb") as file:
            file.seek(-len(end), os.SEEK_END)
            return file.read() == end
    except OSError:
        return False


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """function(item) for each item, in order, computed by `workers` threads (the cores, at most 8) a few items ahead.

    OpenCV and numpy release the interpreter lock, so threads suffice; memory holds a few results at a time.
    """
    workers = workers or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
