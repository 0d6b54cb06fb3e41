"""data_utils/per_frame.py: frames over threads, and tools that only one thread at a time can use."""

import contextlib
import threading
import time

import pytest

from data_utils.per_frame import Lent, ordered_map


class Tool:
    """Notices when two threads use it at once, and whether it was closed."""

    def __init__(self):
        self.lock, self.closed = threading.Lock(), False

    def __call__(self, x: int) -> int:
        assert self.lock.acquire(blocking=False), "two threads at once"
        time.sleep(0.001)
        self.lock.release()
        return x * x

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


def test_results_come_in_order_though_several_threads_share_fewer_tools():
    made = []

    def make():
        made.append(Tool())
        return made[-1]

    with Lent(make, 2) as tools:

        def square(x):
            with tools.one() as tool:
                return tool(x)

        assert list(ordered_map(square, range(60), 6)) == [x * x for x in range(60)]
        assert not any(tool.closed for tool in made)
    assert len(made) == 2 and all(tool.closed for tool in made)


def test_a_tool_is_given_back_when_its_user_fails():
    with Lent(Tool, 1) as tools:
        with contextlib.suppress(ZeroDivisionError), tools.one():
            raise ZeroDivisionError
        with tools.one() as tool:
            assert tool(3) == 9


def test_if_one_tool_cannot_be_made_the_others_are_closed():
    made = []

    def make():
        if len(made) == 2:
            raise OSError("no more")
        made.append(Tool())
        return made[-1]

    with pytest.raises(OSError, match="no more"):
        Lent(make, 3)
    assert all(tool.closed for tool in made)


def test_the_first_failure_ends_the_work():
    def fail(x):
        if x == 5:
            raise ValueError("frame 5")
        return x

    with pytest.raises(ValueError, match="frame 5"):
        list(ordered_map(fail, range(1000), 3))
