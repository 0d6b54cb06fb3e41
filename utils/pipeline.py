"""Two ends of a bounded assembly line: work prefetched on threads, results consumed on threads, in order, in flat memory."""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


def prefetch(work: Callable[[Any], Any], items: Iterable, threads: int = 2, ahead: int = 4) -> Iterator:
    """Yield work(item) in the order of `items`, computed up to `ahead` items early on `threads` threads.

    What `work` raises is raised here, at the item that failed; nothing further is started then, nor after close().

    `work` should compute nothing with torch: OpenMP would start threads for each of these too, and with more threads than cores
    those of the caller sleep between any two steps, of which a rendered frame takes hundreds: a quarter fewer frames a second.
    """
    items, waiting = iter(items), collections.deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Rows:
    """Rows of a stream by number, for readers that move forward together: at least `kept` rows before a read one stay.

    Safe to read from several threads.
    """

    def __init__(self, blocks: Iterable[np.ndarray], kept: int = 2000):
        """blocks: (n, D) arrays of consecutive rows."""
        self._blocks, self._kept, self._lock = iter(blocks), kept, threading.Lock()
        self._held: collections.deque[np.ndarray] = collections.deque()
        self._first = self._end = 0

    def __getitem__(self, key: slice) -> np.ndarray:
        """Rows key.start .. key.stop - 1, or as many of them as the stream has."""
        with self._lock:
            while self._end < key.stop and (block := next(self._blocks, None)) is not None:
                self._held.append(block)
                self._end += len(block)
            if key.start < self._first:
                raise IndexError(f"row {key.start} has passed: {self._kept} are kept")
            while self._held and self._first + len(self._held[0]) <= key.start - self._kept:
                self._first += len(self._held.popleft())
            return np.concatenate(list(self._held))[key.start - self._first : key.stop - self._first]


class Consumer:
    """A thread that calls `consume(item)` for everything put, in order.

    `put` blocks while `depth` items wait. What `consume` raises is raised by the next `put`, or by `close`, which waits
    until everything put is consumed. As a context manager it closes at the end, and drops what waits after an error.
    `done(item)` is called for everything put, consumed or dropped; an error is known by then to the next `put`.
    """

    def __init__(self, consume: Callable[[Any], None], depth: int = 4, done: Callable[[Any], None] = lambda item: None):
        self._consume, self._done = consume, done
        self._queue: queue.Queue = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="consumer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            for step in (self._consume, self._done) if self._error is None else (self._done,):
                try:
                    step(item[0])
                except BaseException as error:  # handed to the thread that feeds us
                    self._error = self._error or error

    def put(self, item: Any) -> None:
        self._raise()
        self._queue.put((item,))

    def close(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Consumer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
            return
        self._error = self._error or error  # nothing that waits is worth finishing
        self._queue.put(None)
        self._thread.join()
