"""Videos written by a process of their own.

Encoding a video takes turns at Python's lock, several for every frame. Here they are another process's turns: the video that
somebody waits for does not stand in line behind the ones beside it. Frames go through memory that both processes map, in slots
of a batch each.
"""

from __future__ import annotations

import collections
import contextlib
import math
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.errors import UserError, command_line
from utils.pipeline import Consumer
from utils.video import VideoWriter

SLOTS = 4


class VideoProcess:
    """Several VideoWriters, and as them a context manager: the files appear when all are complete; none do without a frame.

    What a writer raises is raised by a later `add`, or at the end, as a UserError if it is one or a file could not be written.
    """

    def __init__(self, videos: list[Callable[[], VideoWriter]]):
        """videos: what makes the VideoWriters; they are made in the other process, so it must be possible to pickle it."""
        self._videos, self._to_the_end = videos, True
        self._slots: list[list[np.ndarray]] = []  # of _mapped; none before the first batch
        self._busy = collections.Counter()  # slot -> videos that still read it
        self._number = 0  # of the next batch
        # not /dev/shm, of which containers have 64 MB
        self._memory = open(os.memfd_create("frames"), "r+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()
        self._errors = tempfile.TemporaryFile()  # no pipe, which would fill up if much is said
        # in a session of its own: Ctrl-C is for us alone, and we say where the videos end
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._errors, pass_fds=[self._memory.fileno()], start_new_session=True)  # fmt: skip

    def add(self, batches: list[np.ndarray]) -> None:
        """For each video its next frames: (B, ...) uint8 of what VideoWriter.add takes. No batch is longer than the first."""
        if not self._slots:
            self._share([batch.shape for batch in batches])
        slot = self._number % SLOTS
        while self._busy[slot]:
            done = self._process.stdout.read(1)
            if not done:
                self._finish()
            self._busy[done[0]] -= 1
        for place, batch in zip(self._slots[slot], batches, strict=True):
            place[: len(batch)] = batch
        self._send((slot, len(batches[0])))
        self._busy[slot] = len(batches)
        self._number += 1

    def end_with_last_frame(self) -> None:
        """As VideoWriter's."""
        self._to_the_end = False

    def _share(self, shapes: list[tuple[int, ...]]) -> None:
        self._memory.truncate(SLOTS * sum(map(math.prod, shapes)))
        self._slots = _mapped(self._memory.fileno(), shapes)
        self._send((self._videos, self._memory.fileno(), shapes))

    def _send(self, message: Any) -> None:
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._finish()

    def _finish(self) -> None:
        """Wait for the process. Raises what it died of, if it did."""
        self._process.communicate()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        if self._process.returncode == 2:
            raise UserError(said.removeprefix("error: "))
        if self._process.returncode:
            raise RuntimeError(f"the process that writes videos ended with status {self._process.returncode}: {said}")

    def __enter__(self) -> VideoProcess:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None and self._slots:
                self._send(self._to_the_end)
                self._finish()
            else:
                self._process.communicate()  # it sees no end, and leaves no files
        finally:
            self._memory.close()
            self._errors.close()


def _mapped(memory: int, shapes: list[tuple[int, ...]]) -> list[list[np.ndarray]]:
    """For each slot of the memory behind a file descriptor: for each video a batch, uint8."""
    slots = np.frombuffer(mmap.mmap(memory, 0), np.uint8).reshape(SLOTS, -1)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [[part.reshape(shape) for part, shape in zip(np.split(slot, ends[:-1]), shapes, strict=True)] for slot in slots]


@command_line
def main() -> None:
    """The other process: what VideoProcess sends to stdin, into videos, each on a thread of its own. Each of these says on stdout
    which slot it has read."""

    def consumer(writer: VideoWriter) -> Consumer:
        def write(batch: tuple[int, np.ndarray]) -> None:
            for frame in batch[1]:
                writer.add(frame)

        # a slot is given back also after an error: the next batch must come, for put to raise it
        return stack.enter_context(Consumer(write, SLOTS, done=lambda batch: os.write(sys.stdout.fileno(), bytes([batch[0]]))))

    with contextlib.suppress(EOFError, pickle.UnpicklingError), contextlib.ExitStack() as stack:  # no end: who sent is gone
        videos, memory, shapes = pickle.load(sys.stdin.buffer)  # of the VideoProcess that started us, and of nobody else
        slots = _mapped(memory, shapes)
        writers = [stack.enter_context(make()) for make in videos]
        consumers = [consumer(writer) for writer in writers]
        while isinstance(message := pickle.load(sys.stdin.buffer), tuple):
            slot, count = message
            for writes, frames in zip(consumers, slots[slot], strict=True):
                writes.put((slot, frames[:count]))
        if not message:
            for writer in writers:
                writer.end_with_last_frame()


if __name__ == "__main__":
    main()
