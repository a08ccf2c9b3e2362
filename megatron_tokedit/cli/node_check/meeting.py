"""Where the nodes meet: a key-value store on node 0, the leader.

Invariant: the leader waits for nobody longer than it says, and learns who did not answer; a follower ends by
itself where the leader is gone or says nothing. Values are JSON.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from megatron_tokedit.errors import TokeditError

_POLL_SECONDS = 0.02
_POLL_SECONDS_A_NODE = 0.0002
_KNOCK_SECONDS = 0.5


class LeaderGone(TokeditError):
    """Node 0 cannot be reached, or not any more."""


@dataclass(frozen=True, slots=True)
class Place:
    """Who this node is and where all meet.

    Attributes:
        rank: this node's number; 0 leads.
        names: host names of all nodes, by rank.
        address: of node 0, a name or an IP address.
        port: of the store there.
    """

    rank: int
    names: tuple[str, ...]
    address: str
    port: int

    @property
    def head(self) -> str:
        """Node 0 for a message."""
        return f"node {self.names[0]} ({self.address}:{self.port})"


class Meeting:
    """A node's connection to the store.

    Args:
        place: who and where.
        store: any ``torch.distributed`` store.
        connect: makes one more connection to the same store, for threads that may be left behind.
    """

    def __init__(self, place: Place, store: Any, connect: Callable[[], Any]) -> None:
        self.place = place
        self.connect = connect
        self._store = store
        self._poll_seconds = _POLL_SECONDS + _POLL_SECONDS_A_NODE * len(place.names)

    def publish(self, key: str, value: Any) -> None:
        """Set a key.

        Raises:
            LeaderGone: the store is.
        """
        self._ask(lambda: self._store.set(key, json.dumps(value)))

    def first_of(self, keys: Sequence[str], seconds: float) -> tuple[str, Any] | None:
        """The first of these keys that is set, with its value; None where none is in time.

        Raises:
            LeaderGone: the store is.
        """
        deadline = time.monotonic() + seconds
        while True:
            for key in keys:
                if self._ask(lambda key=key: self._store.check([key])):  # type: ignore[misc]
                    return key, json.loads(self._ask(lambda key=key: self._store.get(key)))  # type: ignore[misc]
            if time.monotonic() > deadline:
                return None
            time.sleep(self._poll_seconds)

    def gather(self, key: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """The values of ``key/RANK`` of those who set it in time."""
        waiting = sorted(ranks)
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while waiting:
            for rank in waiting:
                if self._store.check([f"{key}/{rank}"]):
                    answers[rank] = json.loads(self._store.get(f"{key}/{rank}"))
            waiting = [rank for rank in waiting if rank not in answers]
            if not waiting or time.monotonic() > deadline:
                break
            time.sleep(self._poll_seconds)
        return answers

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except RuntimeError as error:  # torch's family of store and network errors
            raise LeaderGone(
                f"{self.place.head}, which leads the check, is gone: {_first_line(error)}"
            ) from error


def open_meeting(place: Place, join_seconds: float) -> Meeting:
    """Open the store (node 0) or go there.

    Raises:
        LeaderGone: the store cannot be opened or reached in time.
    """
    if len(place.names) == 1:
        import torch.distributed as dist

        store = dist.HashStore()
        return Meeting(place, store, lambda: store)
    if place.rank == 0:
        store = _tcp_store(place, opens=True)
    else:
        _knock(place, time.monotonic() + join_seconds)
        store = _tcp_store(place)
    return Meeting(place, store, lambda: _tcp_store(place))


def _tcp_store(place: Place, *, opens: bool = False) -> Any:
    import torch.distributed as dist

    limit = timedelta(seconds=10)
    try:
        return dist.TCPStore(place.address, place.port, None, opens, limit, wait_for_workers=False)
    except RuntimeError as error:
        doing = "cannot open its store for the others" if opens else "cannot be reached"
        hint = "is the port in use, and is the address one of this node's?" if opens else ""
        raise LeaderGone(f"{place.head} {doing}: {_first_line(error)}{'; ' if hint else ''}{hint}") from error


def _knock(place: Place, deadline: float) -> None:
    """Wait until somebody listens at the leader's address and port."""
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=3.0).close()
            return
        except OSError as error:
            reason = "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error))
        if time.monotonic() > deadline:
            raise LeaderGone(
                f"cannot reach {place.head}: {reason}; does the address belong to that node, does its check "
                f"run, and is the port open between the nodes?"
            )
        time.sleep(_KNOCK_SECONDS)


def own_address(place: Place) -> str | None:
    """This node's address on the way to the leader; sends nothing."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(
            place.address or "127.0.0.1", place.port or 1, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
