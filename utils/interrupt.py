"""Ctrl-C as a request: work that must not be torn apart ends where it can end well."""

from __future__ import annotations

import os
import signal
import threading


class Interrupt:
    """with Interrupt("finishing the file") as interrupt: within it Ctrl-C, however often, only sets `interrupt.asked`.

    The first one also writes the message to stderr. Other signals do what they did, so that what hangs can still be ended.
    Outside of the main thread, and where Ctrl-C is ignored (nohup, a script's background), nothing changes.
    """

    def __init__(self, message: str):
        self._message, self._before = message, None
        self.asked = False

    def _ask(self, number, frame) -> None:
        if not self.asked:
            self.asked = True
            os.write(2, f"\n{self._message}\n".encode())  # sys.stderr may be in use by the very code that was interrupted

    def __enter__(self) -> Interrupt:
        ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
