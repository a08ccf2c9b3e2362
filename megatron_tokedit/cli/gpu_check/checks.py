"""What a check is and how it comes out.

Invariant: a check passes, fails or is skipped; skipped is only what the machine cannot do, with the reason
(what is installed but broken is no such reason), and whatever goes wrong in a check is its own failure and
stops no other.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from megatron_tokedit.cli.gpu_check.layer_jobs import look_at_machine
from megatron_tokedit.cli.gpu_check.runner import JobFailed, Runner, job
from megatron_tokedit.config.recipes import RECIPES

Status = Literal["passed", "failed", "skipped"]


class Bench:
    """What the checks work with: the jobs, and what the machine offers."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    @cached_property
    def machine(self) -> dict[str, Any]:
        """See ``layer_jobs.look_at_machine``.

        Raises:
            JobFailed: not even that is possible.
        """
        found = self.runner.run(job("machine", look_at_machine, limit_seconds=120))
        self.runner.use_scale_of(has_gpu=found["probe"]["has_cuda"])
        return found

    @property
    def has_gpu(self) -> bool:
        """Whether there is a CUDA device."""
        return bool(self.machine["probe"]["has_cuda"])


@dataclass(slots=True)
class Verdict:
    """What a check found.

    Attributes:
        numbers: what it measured; nested at most once.
        faults: what is wrong, one sentence each; none: passed.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is to be proved.

    Attributes:
        name: as in ``--only``.
        proves: one line.
        verify: measures and judges.
        recipes: precision recipes that the machine has to honour.
        needs_gpu: there is nothing to check without one.
        runs_alone: it measures speed: nothing else may run meanwhile.
        packs_rows: it needs an attention that takes packed rows.
    """

    name: str
    proves: str
    verify: Callable[[Bench], Verdict]
    recipes: tuple[str, ...] = ()
    needs_gpu: bool = False
    runs_alone: bool = False
    packs_rows: bool = False

    def lacking(self, bench: Bench) -> list[str]:
        """What the machine lacks for it, one sentence each."""
        if self.needs_gpu and not bench.has_gpu:
            return ["no CUDA device"]
        lacks = [fault for recipe in self.recipes for fault in bench.machine["recipes"][recipe]]
        if not bench.has_gpu and any(RECIPES[recipe].is_fp8 for recipe in self.recipes):  # type: ignore[index]
            lacks = lacks or ["no CUDA device"]
        if self.packs_rows:
            lacks += bench.machine["packing"]
        return list(dict.fromkeys(lacks))


@dataclass(slots=True)
class Outcome:
    """How a check came out.

    Attributes:
        name: of the check.
        proves: of the check.
        status: passed, failed or skipped.
        seconds: what it took, the jobs included that it was the first to need.
        numbers: what it measured.
        reasons: why it failed or was skipped, one sentence each.
        details: traceback, or the end of the log of a job that died; empty where there is none.
    """

    name: str
    proves: str
    status: Status
    seconds: float
    numbers: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    details: str = ""


def run_check(check: Check, bench: Bench) -> Outcome:
    """Do a check; never raises but for an interrupt."""
    begin = time.monotonic()
    outcome = Outcome(check.name, check.proves, "failed", 0.0)
    try:
        if lacks := check.lacking(bench):
            is_broken = not set(lacks).isdisjoint(bench.machine["probe"]["faults"])
            outcome.status, outcome.reasons = "failed" if is_broken else "skipped", lacks
        else:
            verdict = check.verify(bench)
            outcome.numbers, outcome.reasons = verdict.numbers, verdict.faults
            outcome.status = "failed" if verdict.faults else "passed"
    except JobFailed as failure:
        outcome.reasons, outcome.details = [str(failure)], failure.details
    except Exception as error:  # noqa: BLE001 - a mistake in a check is a failure of that check
        outcome.reasons, outcome.details = [f"{type(error).__name__}: {error}"], traceback.format_exc()
    outcome.seconds = round(time.monotonic() - begin, 1)
    return outcome
