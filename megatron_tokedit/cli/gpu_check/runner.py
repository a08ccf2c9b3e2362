"""Jobs: each in a process of its own, at most once, with a time limit.

Invariant: a job that fails, hangs or takes its process down costs itself only; those who need its numbers are
told why there are none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tokedit.cli.gpu_check.sizes import CPU, GPU, Scale

Numbers = dict[str, Any]
_TAIL_LINES = 15


class JobFailed(Exception):
    """A job that has no numbers.

    Attributes:
        details: its traceback, or the end of what it wrote.
    """

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work.

    Attributes:
        name: of the job; a job of the same name is the same job.
        function: called with the work folder, the scale and the arguments; a module's own, not nested.
        limit_seconds: when it is ended.
        hides_gpu: whether it runs as on a machine without a GPU, and without the packages made for one.
        arguments: JSON-able.
    """

    name: str
    function: str
    limit_seconds: float
    hides_gpu: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


def job(
    name: str,
    function: Callable[..., Numbers],
    /,
    *,
    limit_seconds: float,
    hides_gpu: bool = False,
    **arguments: Any,
) -> Job:
    """A :class:`Job` of a function."""
    return Job(name, f"{function.__module__}:{function.__name__}", limit_seconds, hides_gpu, arguments)


class Runner:
    """Runs jobs in a work folder; several threads may use it.

    Args:
        folder: made if needed; holds what the jobs leave behind, and their logs.
        echo: is told of every job that is started.
    """

    def __init__(self, folder: Path, echo: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder
        self.scale: Scale = CPU
        self.job_seconds: dict[str, float] = {}
        self._echo = echo
        self._done: dict[str, Numbers | JobFailed] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._is_closed = False
        (folder / "jobs").mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """End the jobs under way, and start no more."""
        with self._guard:
            self._is_closed = True
            for process in self._running:
                _kill(process)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed: a job that failed since may only have been ended."""
        return self._is_closed

    def use_scale_of(self, *, has_gpu: bool) -> None:
        """Choose the sizes."""
        self.scale = GPU if has_gpu else CPU

    def run(self, wanted: Job) -> Numbers:
        """The numbers of a job; run only if it was not yet. Threads that want the same job wait for it.

        Raises:
            JobFailed: now, or when it was run before.
        """
        with self._guard:
            lock = self._locks.setdefault(wanted.name, threading.Lock())
        with lock:
            if wanted.name not in self._done:
                begin = time.monotonic()
                try:
                    self._done[wanted.name] = self._run(wanted)
                except JobFailed as failure:
                    self._done[wanted.name] = failure
                self.job_seconds[wanted.name] = round(time.monotonic() - begin, 2)
            result = self._done[wanted.name]
        if isinstance(result, JobFailed):
            raise result
        return result

    def _run(self, wanted: Job) -> Numbers:
        place = self.folder / "jobs" / wanted.name
        request, answer, log = (place.with_suffix(suffix) for suffix in (".json", ".answer.json", ".log"))
        answer.unlink(missing_ok=True)
        content = {
            "function": wanted.function,
            "folder": str(self.folder),
            "scale": self.scale.name,
            "arguments": wanted.arguments,
            "hides_gpu": wanted.hides_gpu,
            "answer": str(answer),
        }
        request.write_text(json.dumps(content, indent=1), encoding="utf-8")
        self._echo(wanted.name)
        with log.open("wb") as output:
            code = self._in_process(request, output, wanted)
        if code is None:
            raise JobFailed(f"job {wanted.name}: ended after {wanted.limit_seconds:.0f} s", _tail(log))
        if not answer.exists():
            raise JobFailed(f"job {wanted.name}: its process died ({_ending(code)})", _tail(log))
        result = json.loads(answer.read_text(encoding="utf-8"))
        if "traceback" in result:
            last = result["traceback"].strip().splitlines()[-1]
            raise JobFailed(f"job {wanted.name}: {last}", result["traceback"])
        numbers: Numbers = result["numbers"]
        return numbers

    def _in_process(self, request: Path, output: Any, wanted: Job) -> int | None:
        """Exit code; None where the time ran out. Nothing of the job is left when it returns."""
        with self._guard:
            if self._is_closed:
                raise JobFailed(f"job {wanted.name}: not started", "")
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_tokedit.cli.gpu_check.child", str(request)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(wanted),
                start_new_session=True,
            )
            self._running.add(process)
        try:
            return process.wait(timeout=wanted.limit_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill(process)
            process.wait()
            with self._guard:
                self._running.discard(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a job and what it has started: its session is its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(wanted: Job) -> dict[str, str]:
    """No launcher's variables: a job is a world of its own."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    kept |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return kept | ({"CUDA_VISIBLE_DEVICES": ""} if wanted.hides_gpu else {})


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
