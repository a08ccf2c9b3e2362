"""What a node does when the leader asks: each task within its time, whatever goes wrong becomes an answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_tokedit.cli.node_check import clock, links
from megatron_tokedit.cli.node_check.deadlines import Background, TookTooLong, within
from megatron_tokedit.cli.node_check.disks import SharedFolder
from megatron_tokedit.cli.node_check.facts import Facts
from megatron_tokedit.cli.node_check.findings import NO_ANSWER
from megatron_tokedit.cli.node_check.meeting import Meeting

Answer = dict[str, Any]

DOING = {
    "facts": "looking at its GPUs, disks and packages",
    "clock": "comparing clocks",
    "folder": "writing to the run folder",
    "link": "sending to another node",
    "copies": "copying between its GPUs",
}
_OWN_SHARE = 0.7
"""Of the time that the leader waits: a node that overruns it can still say so."""
_CONNECT_SHARE = 0.7
_CLEAR_SECONDS = 2.0


class Work:
    """A node's hands.

    Args:
        meeting: with the others.
        path: the run folder, there or not.
        facts: being collected since the start of the process.
    """

    def __init__(self, meeting: Meeting, path: Path, facts: Background[Facts]) -> None:
        self._meeting = meeting
        self._path = path
        self._facts = facts
        self._folder: SharedFolder | None = None

    def do(self, message: Mapping[str, Any]) -> Answer:
        """Do a task. ``message`` holds its name, its seconds and what it needs; never raises.

        Returns:
            The task's result, or ``{"fault": sentence}``.
        """
        name, seconds = message["task"], message["seconds"] * _OWN_SHARE
        if name == "facts":
            return self._caught(name, seconds, lambda: {"facts": self._facts.result(seconds).to_json()})
        tasks: dict[str, Callable[[], Answer]] = {
            "clock": self._clock,
            "folder": lambda: self._share(message, time.monotonic() + seconds * _CONNECT_SHARE),
            "link": lambda: self._link(message, seconds * _CONNECT_SHARE),
            "copies": lambda: {"gb": links.measure_copies()},
        }
        return self._caught(name, seconds, lambda: within(seconds, tasks[name]))

    def _caught(self, name: str, seconds: float, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except TookTooLong:
            if name == "link":
                return {"fault": NO_ANSWER}
            return {"fault": f"{DOING[name]} takes longer than {seconds:.0f} s"}
        except Exception as error:  # noqa: BLE001 - drivers and file systems raise anything; it is an answer
            why = links.why_failed(error)
            return {"fault": why if name == "link" else f"{DOING[name]} failed: {why}"}

    def _clock(self) -> Answer:
        ahead, round_trip = clock.ask(self._meeting.connect(), self._meeting.place.rank)
        return {"seconds_ahead": ahead, "round_trip_seconds": round_trip}

    def _share(self, message: Mapping[str, Any], deadline: float) -> Answer:
        """Write this node's file, then look for the leader's, which is there."""
        self._folder = SharedFolder(self._path, message["nonce"])
        rank = self._meeting.place.rank
        if fault := self._folder.write(rank):
            return {"fault": fault}
        return {"sees_leader": rank == 0 or self._folder.sees(0, deadline)}

    def sees(self, ranks: list[int], seconds: float) -> dict[int, bool]:
        """The leader's look for the files of others; empty where it cannot look."""
        folder, deadline = self._folder, time.monotonic() + seconds
        if folder is None:
            return {}
        try:
            return within(seconds + 1.0, lambda: {rank: folder.sees(rank, deadline) for rank in ranks})
        except TookTooLong:
            return {}

    def _link(self, message: Mapping[str, Any], seconds: float) -> Answer:
        rank = self._meeting.place.rank
        first, second = next(pair for pair in message["pairs"] if rank in pair)
        partner = second if rank == first else first
        store = self._meeting.connect()
        if message["transport"] == "nccl":
            return {"gb": links.measure_nccl(store, rank, partner)}
        return {"gb": links.measure_gloo(store, rank, partner, seconds)}

    def clear(self, *, everyone: bool) -> None:
        """Remove this node's file in the run folder, or those of all nodes, which nobody needs any more."""
        folder, rank = self._folder, self._meeting.place.rank
        if folder is not None:
            with contextlib.suppress(TookTooLong):
                within(_CLEAR_SECONDS, lambda: folder.clear(None if everyone else rank))
