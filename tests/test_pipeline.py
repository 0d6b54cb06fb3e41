"""Work flows in order through bounded threads, and an error at either end reaches the caller."""

import threading
import time

import numpy as np
import pytest

from utils.pipeline import Consumer, Rows, prefetch


def test_results_come_in_order_however_long_each_takes():
    def work(i):
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(prefetch(work, range(50), threads=4, ahead=6)) == [i * i for i in range(50)]


def test_no_more_than_the_allowed_items_are_worked_on_ahead():
    started = []
    results = prefetch(lambda i: started.append(i), iter(range(10**9)), threads=2, ahead=3)  # endless: read lazily
    for _ in range(5):
        next(results)
    results.close()
    assert 5 <= len(started) <= 5 + 3


def test_what_the_work_raises_is_raised_at_its_item_and_stops_the_rest():
    started = []

    def work(i):
        started.append(i)
        if i == 5:
            raise ValueError("frame 5")
        return i

    seen = []
    with pytest.raises(ValueError, match="frame 5"):
        for result in prefetch(work, range(10_000), ahead=4):
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4] and len(started) < 20


def test_everything_put_is_consumed_in_order_before_close_returns():
    seen = []
    with Consumer(lambda i: (time.sleep(0.001), seen.append(i)), depth=2) as consumer:
        for i in range(40):
            consumer.put(i)
    assert seen == list(range(40))


def test_a_slow_consumer_holds_the_producer_back():
    gate, seen = threading.Event(), []
    consumer = Consumer(lambda i: (gate.wait(10), seen.append(i)), depth=2)
    for i in range(3):
        consumer.put(i)  # one in hand, two waiting
    blocked = threading.Thread(target=consumer.put, args=(3,))
    blocked.start()
    blocked.join(0.1)
    assert blocked.is_alive() and seen == []
    gate.set()
    blocked.join(10)
    consumer.close()
    assert seen == [0, 1, 2, 3]


def test_what_the_consumer_raises_reaches_the_producer_at_the_latest_on_close():
    def consume(i):
        if i == 3:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Consumer(consume, depth=2) as consumer:
        for i in range(100):
            consumer.put(i)


def test_whatever_is_put_is_done_with_after_an_error_too_and_the_error_is_known_by_then():
    gate, done = threading.Event(), []

    def consume(i):
        gate.wait(10)
        if i == 1:
            raise OSError("disk full")

    def known(i):
        done.append((i, consumer._error is not None))

    consumer = Consumer(consume, depth=8, done=known)
    for i in range(4):
        consumer.put(i)
    gate.set()
    with pytest.raises(OSError, match="disk full"):
        consumer.close()
    assert done == [(0, False), (1, True), (2, True), (3, True)]


def test_an_error_of_the_producer_ends_the_thread_without_finishing_what_waits():
    gate, seen = threading.Event(), []
    with pytest.raises(KeyError), Consumer(lambda i: (gate.wait(10), seen.append(i)), depth=8) as consumer:
        for i in range(6):
            consumer.put(i)
        threading.Timer(0.1, gate.set).start()
        raise KeyError
    assert not consumer._thread.is_alive() and len(seen) <= 1


@pytest.mark.parametrize("size", [1, 3, 40])
def test_rows_of_a_stream_stay_for_readers_that_lag_and_go_for_good_after_them(size):
    data, given = np.arange(100)[:, None], []

    def blocks():
        for k in range(0, 100, size):
            given.append(k)
            yield data[k : k + size]

    rows = Rows(blocks(), kept=10)
    for start in (0, 6, 4, 30, 22, 60, 50):  # a reader up to 10 behind another
        np.testing.assert_array_equal(rows[start : start + 8], data[start : start + 8])
    assert given[-1] <= 68  # and nothing is asked for before it is needed
    np.testing.assert_array_equal(rows[95:120], data[95:])  # what there is
    with pytest.raises(IndexError):
        rows[2:4]
