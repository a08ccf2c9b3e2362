"""Every other node's part: come, do what is asked, hear the verdict.

Invariant: it ends by itself where the leader is gone, stands still or never comes.
"""

from __future__ import annotations

import sys

from megatron_tokedit.cli.main import EXIT_ERROR, EXIT_OK
from megatron_tokedit.cli.node_check.deadlines import Watchdog
from megatron_tokedit.cli.node_check.leader import WATCHDOG_SECONDS
from megatron_tokedit.cli.node_check.meeting import LeaderGone, Meeting
from megatron_tokedit.cli.node_check.table import own_line
from megatron_tokedit.cli.node_check.work import Work

_PAUSE_FACTOR = 3
"""A task on GPUs may take the leader twice as long as another, and it looks itself afterwards."""


def follow(meeting: Meeting, work: Work, watchdog: Watchdog, join_seconds: float, task_seconds: float) -> int:
    """Do tasks until the verdict; returns the exit code: 1 where this node has faults.

    Raises:
        LeaderGone: no task and no verdict in time.
    """
    rank = meeting.place.rank
    meeting.publish(f"join/{rank}", {})
    number, patience = 0, join_seconds + task_seconds
    while True:
        watchdog.allow(patience + WATCHDOG_SECONDS)
        found = meeting.first_of([f"task/{number}", "verdict"], patience)
        if found is None:
            raise LeaderGone(
                f"{meeting.place.head}, which leads the check, has said nothing for {patience:.0f} s"
            )
        key, message = found
        if key == "verdict":
            return _hear(meeting, message[str(rank)])
        if rank in message["ranks"]:
            meeting.publish(f"answer/{number}/{rank}", work.do(message))
        number, patience = number + 1, task_seconds * _PAUSE_FACTOR


def _hear(meeting: Meeting, faults: list[str]) -> int:
    """Say this node's own faults before the leader ends and takes the store along."""
    if faults:
        sys.stderr.write(f"error: {own_line(meeting.place.names[meeting.place.rank], faults)}\n")
        sys.stderr.flush()
    meeting.publish(f"heard/{meeting.place.rank}", {})
    return EXIT_ERROR if faults else EXIT_OK
