"""How far a node's clock is from the leader's, estimated as NTP does.

A node notes when it asks (t1) and when the answer is there (t4), the leader when it saw the question and
answered (t2, here one moment). The leader's clock is ahead by ((t2 - t1) + (t2 - t4)) / 2, wrong by half the
round trip t4 - t1 at most; of several exchanges the one with the shortest round trip counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

EXCHANGES = 8
Clock = Callable[[], float]


def offset_of(samples: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds that this node is ahead of the leader, and the round trip that says so.

    Args:
        samples: (t1, t2, t4) of each exchange; t2 by the leader's clock.
    """
    asked, seen, answered = min(samples, key=lambda sample: sample[2] - sample[0])
    return (asked + answered) / 2 - seen, answered - asked


def ask(store: Any, rank: int, clock: Clock = time.time) -> tuple[float, float]:
    """A follower's part; see :func:`offset_of`. Raises the store's error where no answer comes."""
    samples = []
    for number in range(EXCHANGES):
        asked = clock()
        store.set(f"clock/ask/{rank}/{number}", "")
        seen = float(store.get(f"clock/answer/{rank}/{number}"))
        samples.append((asked, seen, clock()))
    return offset_of(samples)


def answer(store: Any, ranks: Iterable[int], seconds: float, clock: Clock = time.time) -> None:
    """The leader's part: serve whoever asks, until all are served or the time is over."""
    deadline = time.monotonic() + seconds
    served = dict.fromkeys(ranks, 0)
    while served and time.monotonic() < deadline:
        for rank, number in list(served.items()):
            if store.check([f"clock/ask/{rank}/{number}"]):
                store.set(f"clock/answer/{rank}/{number}", repr(clock()))
                served[rank] += 1
                if served[rank] == EXCHANGES:
                    del served[rank]
