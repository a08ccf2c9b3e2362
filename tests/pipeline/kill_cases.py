"""Jobs that are killed at chosen and at random places, and what they have to come to."""

from __future__ import annotations

import itertools
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
from fork_server import ForkServer, Job
from pipeline_cases import TOKENIZER

from megatron_tokedit.pipeline.plan import load_plan

_TIMES = ("worker_seconds", "time_shares", "tokens_per_worker_second", "peak_memory_bytes_a_worker")


def markers(folder: Path, name: str) -> list[Path]:
    return sorted((folder / f"{name}.work").glob("units/*/*.json"))


def content(path: Path) -> bytes:
    """The bytes of an output; of statistics without times and memory."""
    found = path.read_bytes()
    if not path.name.endswith(".stats.json"):
        return found
    return orjson.dumps({name: value for name, value in orjson.loads(found).items() if name not in _TIMES})


class Case:
    """A job that is run again and again under other names, and what it has to come to."""

    key = "text"

    def __init__(self, server: ForkServer, folder: Path, flags: Sequence[str], suffixes: Sequence[str]):
        self.server, self.folder, self.flags = server, folder, list(flags)
        begin = time.monotonic()
        job = self.start("whole")
        while not (folder / "whole.work" / "plan.json").exists() and job.is_running():
            time.sleep(0.001)
        self.planned_seconds = time.monotonic() - begin
        job.finish()
        self.whole = {suffix: content(self.output("whole", suffix)) for suffix in suffixes}
        self.num_units = len(load_plan(folder / "whole.work" / "plan.json").units)
        self.unit_seconds = (time.monotonic() - begin - self.planned_seconds) / self.num_units

    def what_to_read(self) -> list[str]:
        """Flags of the input."""
        return ["--input", str(self.folder / "corpus.jsonl"), "--append-eod"]

    def output(self, name: str, suffix: str) -> Path:
        """One of a job's outputs."""
        return self.folder / f"{name}_{self.key}_document{suffix}"

    def start(self, name: str, *flags: str, **options: Any) -> Job:
        arguments = [*self.what_to_read(), "--output-prefix", str(self.folder / name)]
        arguments += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", TOKENIZER]
        log = self.folder / f"{name}.log"
        return self.server.start(log, [*arguments, *self.flags, *flags], **options)

    def finished(self, name: str) -> dict[Path, tuple[int, int, int]]:
        """The files of finished units, with what changes when one is written again."""
        states = {}
        for marker in markers(self.folder, name):
            for path in marker.parent.glob(f"{marker.stem}[._]*"):
                if path.suffix != ".tmp":
                    state = path.stat()
                    states[path] = (state.st_ino, state.st_mtime_ns, state.st_size)
        return states

    def phase(self, name: str) -> str:
        """How far a job is."""
        work = self.folder / f"{name}.work"
        if (work / "complete.json").exists():
            return "complete"
        if not (work / "plan.json").exists():
            return "plan"
        return "units" if len(markers(self.folder, name)) < self.num_units else "merge"

    def check_outputs(self, name: str) -> None:
        """What bears an output's name is that output, whole; a complete job has all of them."""
        found = {suffix: self.output(name, suffix) for suffix in self.whole}
        there = {suffix: content(path) for suffix, path in found.items() if path.exists()}
        wrong = [suffix for suffix, content in there.items() if content != self.whole[suffix]]
        assert not wrong, f"{name}: {wrong} look whole and are not"
        assert ".idx" not in there or ".bin" in there
        assert ".manifest.json" not in there or len(there) == len(self.whole)
        assert self.phase(name) != "complete" or len(there) == len(self.whole)

    def check_end(self, name: str) -> None:
        """The job is complete, with the bytes of one that nobody disturbed, and left nothing else behind."""
        assert self.phase(name) == "complete"
        self.check_outputs(name)
        assert not [*self.folder.rglob(f"{name}.work/**/*.tmp"), *self.folder.glob(f"{name}_*.tmp")]

    def kill_and_check(self, name: str, job: Job, before: dict[Path, tuple[int, int, int]]) -> str | None:
        """Kill a job; returns the phase in which it died, None where it had ended."""
        killed = job.kill()
        assert killed or job.returncode == 0, job.log.read_text()
        now = self.finished(name)
        assert before.items() <= now.items() or self.phase(name) == "complete"
        self.check_outputs(name)
        return self.phase(name) if killed else None


def sleep_until(job: Job, condition: Callable[[], bool]) -> None:
    while not condition() and job.is_running():
        time.sleep(0.001)


def kill_at_random_times(case: Case, seed: int, num_kills: int) -> None:
    """Kill jobs, some of them several times, until there were ``num_kills``; every job ends as it should."""
    rng = random.Random(seed)
    died_in: Counter[str] = Counter()
    for trial in itertools.count():
        name = f"out{trial}"
        for _ in range(rng.randint(1, 4)):
            aim = rng.choice(("plan", "units", "merge"))
            wanted = {"plan": 0, "units": rng.randrange(case.num_units), "merge": case.num_units}[aim]
            pause = rng.uniform(0.0, case.planned_seconds if aim == "plan" else case.unit_seconds)
            before = case.finished(name)
            job = case.start(name)
            sleep_until(job, lambda: len(markers(case.folder, name)) >= wanted)  # noqa: B023
            time.sleep(pause)
            phase = case.kill_and_check(name, job, before)
            died_in[phase or "not at all"] += 1
        case.start(name).finish()
        case.check_end(name)
        if died_in.total() - died_in["not at all"] >= num_kills and len(died_in) >= 3:
            break
        assert died_in.total() < 5 * num_kills, died_in
    logging.getLogger(__name__).info("seed %d: died in %s", seed, dict(died_in))


def kill_before_every_step(case: Case, *flags: str) -> int:
    """Kill a job before its first step on the file system, the next one before its second ..."""
    for step in itertools.count(1):
        name = f"step{step}"
        job = case.start(name, *flags, kill_at_step=step)
        if job.wait() == 0:
            case.check_end(name)
            return step
        assert job.returncode == -signal.SIGKILL, job.log.read_text()
        case.check_outputs(name)
        case.start(name, *flags).finish()
        case.check_end(name)
    raise AssertionError
