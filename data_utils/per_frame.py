"""Work done frame by frame: over a few threads, in order, skipping what an interrupted run has already finished."""

from __future__ import annotations

import contextlib
import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
THREADS = min(16, os.cpu_count() or 1)  # that work at frames
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
    """function(item) for each item, in order, computed by `workers` threads (THREADS) a few items ahead.

    OpenCV and numpy release the interpreter lock, so threads suffice; memory holds a few results at a time.
    """
    workers = workers or THREADS
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


class Lent(contextlib.ExitStack, Generic[Item]):
    """Several of a tool that only one thread at a time can use (a MediaPipe task): with tools.one() as tool."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[Item]], count: int):
        super().__init__()
        self._idle: queue.SimpleQueue[Item] = queue.SimpleQueue()
        with contextlib.ExitStack() as made:  # if one fails the others are closed
            for _ in range(count):
                self._idle.put(made.enter_context(make()))
            self.push(made.pop_all())

    @contextlib.contextmanager
    def one(self) -> Iterator[Item]:
        """The tool that is idle, or the first to become so."""
        tool = self._idle.get()
        try:
            yield tool
        finally:
            self._idle.put(tool)
