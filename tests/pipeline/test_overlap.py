"""Threads on either side of the scorer: order, bounds, errors, and that none is left behind."""

from __future__ import annotations

import threading
import time

import pytest

from megatron_tokedit.pipeline.overlap import Behind, ahead


def threads():
    return {thread.name.split("_")[0] for thread in threading.enumerate()} & {"ahead", "behind"}


def numbers(count, made, closed, error_at=None):
    try:
        for number in range(count):
            if number == error_at:
                raise OSError("the disk is gone")
            made.append(number)
            yield number
    finally:
        closed.append(threading.current_thread().name)


def test_ahead_keeps_order_and_closes_its_source_in_its_thread():
    made, closed = [], []
    assert list(ahead(numbers(50, made, closed))) == list(range(50))
    assert closed == ["ahead"]
    assert not threads()


def test_ahead_is_bounded_and_can_be_left():
    made, closed = [], []
    items = ahead(numbers(1000, made, closed), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        assert len(made) <= 5
    items.close()
    assert closed == ["ahead"]
    assert not threads()


def test_an_error_ahead_comes_after_what_was_made_before_it():
    made, closed = [], []
    items = ahead(numbers(10, made, closed, error_at=3))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk"):
        next(items)
    assert not threads()


def test_behind_runs_everything_in_order_before_the_block_ends():
    done = []
    with Behind() as behind:
        for number in range(20):
            behind.submit(lambda value: (time.sleep(0.001), done.append(value)), number)
    assert done == list(range(20))
    assert not threads()


def test_an_error_behind_surfaces_and_later_calls_are_dropped():
    done = []

    def call(number):
        if number == 2:
            raise OSError("no space left")
        done.append(number)

    def submit_all():
        with Behind() as behind:
            for number in range(100):
                behind.submit(call, number)

    with pytest.raises(OSError, match="no space"):
        submit_all()
    assert done[:2] == [0, 1]
    assert len(done) < 10
    assert not threads()
