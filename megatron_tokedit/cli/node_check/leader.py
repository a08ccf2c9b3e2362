"""Node 0's part: who came, what is done next, who answered, the verdict.

Invariant: every node is in the result, whether it came, fell silent or answered; no task waits for anybody
longer than its limit.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_tokedit.cli.node_check import clock
from megatron_tokedit.cli.node_check.deadlines import Background, TookTooLong, Watchdog
from megatron_tokedit.cli.node_check.facts import Facts
from megatron_tokedit.cli.node_check.findings import Link, Node, Transport
from megatron_tokedit.cli.node_check.links import Pair, rounds_of
from megatron_tokedit.cli.node_check.meeting import Meeting
from megatron_tokedit.cli.node_check.work import DOING, Answer, Work
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

_PATIENCE_SECONDS = 3.0
_ACKNOWLEDGE_SECONDS = 3.0
_GPU_FACTOR = 2
"""The first use of a GPU loads its driver's and NCCL's code."""
WATCHDOG_SECONDS = 20.0


class Leader:
    """Asks the nodes, one task after another.

    Args:
        meeting: of all.
        work: node 0's own.
        watchdog: to be told how long a task may take.
        task_seconds: a task's time limit.
    """

    def __init__(self, meeting: Meeting, work: Work, watchdog: Watchdog, task_seconds: float) -> None:
        self.nodes = [Node(rank, name) for rank, name in enumerate(meeting.place.names)]
        self._meeting = meeting
        self._work = work
        self._watchdog = watchdog
        self._task_seconds = task_seconds
        self._num_tasks = 0
        self._present: list[int] = []

    def find_out(self, join_seconds: float) -> list[Node]:
        """All that there is to know, for :func:`judge.judge`."""
        self._join(join_seconds)
        for rank, answer in self._ask("facts", factor=_GPU_FACTOR).items():
            if "facts" in answer:
                self.nodes[rank].facts = Facts.from_json(answer["facts"])
        if len(self._present) > 1:
            for rank, answer in self._ask("clock").items():
                self.nodes[rank].seconds_ahead = answer.get("seconds_ahead")
        self._share_folder()
        self._measure("gloo")
        self._use_gpus()
        return self.nodes

    def announce(self) -> None:
        """Tell every node its faults and give it time to repeat them; node 0's store is gone afterwards."""
        self._meeting.publish("verdict", {str(node.rank): node.faults for node in self.nodes})
        self._meeting.gather("heard", [rank for rank in self._present if rank], _ACKNOWLEDGE_SECONDS)

    def _join(self, seconds: float) -> None:
        self._watchdog.allow(seconds + WATCHDOG_SECONDS)
        others = [node.rank for node in self.nodes[1:]]
        deadline = time.monotonic() + seconds
        came: dict[int, Any] = {}
        waiting = told = others
        while waiting and (left := deadline - time.monotonic()) > 0:
            came |= self._meeting.gather("join", waiting, min(left, _PATIENCE_SECONDS))
            waiting = [rank for rank in others if rank not in came]
            if waiting and (waiting != told or told is others):
                logger.info("waiting for %s", ", ".join(self.nodes[rank].name for rank in waiting))
                told = waiting
        for rank in others:
            if rank not in came:
                self.nodes[rank].missing = f"did not come within {seconds:g} s"
        self._present = [0, *sorted(came)]

    def _ask(
        self, task: str, *, factor: int = 1, only: Sequence[int] | None = None, **details: Any
    ) -> dict[int, Answer]:
        """Answers by rank, node 0's among them; faults among them are noted, as are nodes that give none."""
        ranks = list(self._present if only is None else only)
        seconds = self._task_seconds * factor
        self._watchdog.allow(seconds + WATCHDOG_SECONDS)
        message = {"task": task, "seconds": seconds, "ranks": ranks, **details}
        self._meeting.publish(f"task/{self._num_tasks}", message)
        deadline = time.monotonic() + seconds
        own = Background(lambda: self._own(message))
        others = [rank for rank in ranks if rank]
        answers = self._meeting.gather(f"answer/{self._num_tasks}", others, seconds)
        if 0 in ranks:
            try:
                answers[0] = own.result(deadline - time.monotonic())
            except TookTooLong:
                answers[0] = {"fault": f"{DOING[task]} takes longer than {seconds:.0f} s"}
        self._num_tasks += 1
        for rank in others:
            if rank not in answers:
                self.nodes[rank].missing = f"stopped answering ({DOING[task]}, {seconds:g} s)"
                self._present.remove(rank)
        if task != "link":
            for rank, answer in answers.items():
                self.nodes[rank].told += [answer["fault"]] if "fault" in answer else []
        return answers

    def _own(self, message: dict[str, Any]) -> Answer:
        """Node 0's own part of a task."""
        if 0 not in message["ranks"]:
            return {}
        if message["task"] == "clock":
            clock.answer(self._meeting.connect(), self._present[1:], message["seconds"] / 2)
            return {}
        return self._work.do(message)

    def _share_folder(self) -> None:
        """Every node sees node 0's file and node 0 every node's."""
        nonce = secrets.token_hex(6)
        first = self._ask("folder", only=[0], nonce=nonce)[0]  # others look only when it is there
        if len(self._present) == 1 or "fault" in first:
            return
        answers = self._ask("folder", only=self._present[1:], nonce=nonce)
        wrote = [rank for rank, answer in answers.items() if "fault" not in answer]
        seen = self._work.sees(wrote, self._task_seconds / 3)
        for rank in wrote:
            self.nodes[rank].is_folder_shared = bool(answers[rank]["sees_leader"] and seen.get(rank, True))

    def _measure(self, transport: Transport, factor: int = 1) -> None:
        """All rounds of one transport."""
        for pairs in rounds_of(self._present):
            present = [pair for pair in pairs if set(pair) <= set(self._present)]
            ranks = sorted(rank for pair in present for rank in pair)
            answers = self._ask("link", only=ranks, factor=factor, pairs=present, transport=transport)
            for pair in present:
                self._note_link(pair, answers, transport)

    def _note_link(self, pair: Pair, answers: Mapping[int, Answer], transport: Transport) -> None:
        """Both ends' links: an end that was kept waiting saw less than the network gives."""
        rate = max(answers.get(rank, {}).get("gb") or 0.0 for rank in pair)
        for rank, partner in (pair, pair[::-1]):
            if answer := answers.get(rank):
                fault = answer.get("fault")
                self.nodes[rank].links.append(Link(partner, transport, None if fault else rate, fault))

    def _use_gpus(self) -> None:
        """Copies within nodes, and NCCL between them where every node can."""
        known = [facts for rank in self._present if (facts := self.nodes[rank].facts) is not None]
        if not known or not all(facts.gpus.num_seen_by_torch for facts in known):
            return
        for rank, answer in self._ask("copies", factor=_GPU_FACTOR).items():
            self.nodes[rank].copy_gb_per_second = answer.get("gb")
        if all(facts.versions.get("NCCL") for facts in known):
            self._measure("nccl", _GPU_FACTOR)
