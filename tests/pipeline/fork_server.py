"""Cheap starts of the preprocessing command, to be killed: forks of a process that has imported everything.

Run as a program it is the server; :class:`ForkServer` is its client. A job is the real command in a process
group of its own; its workers are forked instead of spawned, which saves them their imports and nothing else.

A job may be told to stop or to die at its n-th step on the file system: the n-th time that it is about to
open a file for writing, to rename or remove one, or to make a folder, under its output prefix.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STEPS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Job:
    """A running command."""

    server: ForkServer
    pid: int
    log: Path
    returncode: int | None = None

    def is_running(self) -> bool:
        """Whether it has not ended."""
        if self.returncode is None:
            self.returncode = self.server.ask(poll=self.pid)
        return self.returncode is None

    def wait(self) -> int:
        """Exit code; that of a killed process is negative."""
        if self.returncode is None:
            self.returncode = self.server.ask(wait=self.pid)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> bool:
        """kill -9 for it and its workers; returns whether it was still running."""
        if self.is_running():
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def finish(self) -> None:
        """Wait for a good end."""
        assert self.wait() == 0, self.log.read_text()

    def children(self) -> list[int]:
        """Process ids of its workers."""
        ids = map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())
        return [i for i in ids if "resource_tracker" not in Path(f"/proc/{i}/cmdline").read_text()]

    def is_stopped(self) -> bool:
        """Whether it has stopped itself."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].startswith("T")


class ForkServer:
    """Starts the server; ends it when closed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self.ask(ready=None)  # so that the first start is as quick as the others

    def ask(self, **request: Any) -> Any:
        """One request, one answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        log: Path,
        arguments: list[str],
        *,
        kill_at_step: int | None = None,
        stop_at_step: int | None = None,
        steps_under: str = "",
        file_bytes: int | None = None,
    ) -> Job:
        """Run the command with these arguments.

        Args:
            log: gets its stdout and stderr.
            arguments: of ``tools/preprocess_edit.py``.
            kill_at_step: it dies before this step on the file system; from 1 on.
            stop_at_step: it stops (SIGSTOP) before this step.
            steps_under: count only steps on paths with this behind the output prefix.
            file_bytes: no file may become larger, as on a full disk.
        """
        options = {"kill": kill_at_step, "stop": stop_at_step, "file_bytes": file_bytes, "under": steps_under}
        return Job(self, self.ask(start=arguments, log=str(log), options=options), log)

    def close(self) -> None:
        """End the server; its jobs must have ended."""
        self._process.communicate()


def _serve() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer: int | None = None
        if "start" in request:
            answer = _start(request["start"], request["log"], request["options"])
        elif "ready" not in request:
            pid = request.get("wait") or request["poll"]
            ended, status = os.waitpid(pid, 0 if "wait" in request else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _start(arguments: list[str], log: str, options: dict[str, Any]) -> int:
    """Fork a job; returns its process id."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)  # here and there, so that it can be killed at once
        return pid
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((null, output, output)):
        os.dup2(descriptor, number)
    code = 70
    try:
        code = _run(arguments, options)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    except BaseException:  # noqa: BLE001 - its log shows it, and no fork may go on as the server
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str], options: dict[str, Any]) -> int:
    """The command, in a job's process."""
    import multiprocessing
    import resource

    from megatron_tokedit.cli.preprocess_edit import main

    context = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: context
    if (limit := options["file_bytes"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    prefix = arguments[arguments.index("--output-prefix") + 1] + options["under"]
    steps = 0

    def on_event(event: str, values: tuple[Any, ...]) -> None:
        nonlocal steps
        if not (event in _STEPS or (event == "open" and values[2] & _WRITING)):
            return
        if str(values[0]).startswith(prefix):
            steps += 1
            if steps == options["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            if steps == options["stop"]:
                os.kill(os.getpid(), signal.SIGSTOP)

    if options["kill"] or options["stop"]:
        sys.addaudithook(on_event)
    return main(arguments)


if __name__ == "__main__":
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - what a job would import

    import megatron_tokedit.cli.preprocess_edit
    import megatron_tokedit.scoring.huggingface
    import megatron_tokedit.scoring.load  # noqa: F401

    torch.set_num_threads(1)
    _serve()
