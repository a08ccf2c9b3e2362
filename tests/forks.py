"""Processes that are forked instead of started: a start is five seconds of imports, a fork a tenth of one.

Multiprocessing's fork server imports once what commands and ranks need. A forked command is the program of
the same name with arguments, environment, output, signals and an exit code of its own. What a fork does not
show is an import, what it warns of, a launcher, another seed of hashes (all forks have the server's), or what
happens when Python ends (a fork leaves without): tests about those start Python.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy

from megatron_tokedit.testing import ranks

ROOT = Path(__file__).resolve().parents[1]
_OF_THE_SERVER = ranks._WORKER_ENVIRONMENT | {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).resolve().parent), *filter(None, [os.getenv("PYTHONPATH")])]
    ),
}
_real_context = multiprocessing.get_context


class _Process(ForkServerProcess):
    """Has the environment of who starts it, not the server's."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._environment = dict(os.environ)

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        numpy.random.seed()  # not the one that all forks would share
        super().run()


class _Context(ForkServerContext):
    Process = _Process


def fork_server() -> _Context:
    """The server of this process and of what it forks; it is started by the first call."""
    from multiprocessing.forkserver import ensure_running

    context = _Context()
    if multiprocessing.parent_process() is None:
        context.set_forkserver_preload(["forks_imports"])
        with ranks._environment(_OF_THE_SERVER, ranks._LAUNCHER_VARIABLES):
            ensure_running()
    return context


def forked_for_spawned(method: str | None = None) -> BaseContext:
    """Instead of ``multiprocessing.get_context``: workers that would be spawned are forked by the server."""
    return fork_server() if method == "spawn" else _real_context(method)


class ForkedRanks(ranks.RankPool):
    """A pool whose ranks have imported everything when they begin, also those that replace killed ones."""

    def _start(self, world_size: int) -> None:
        while len(self._ranks) < world_size:
            context = fork_server()
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """As the pool's; all ranks have met when the first begins, as they forget a call quickly."""
        return super().run(_together, function, *args, **options)


def _together(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    import torch.distributed as dist

    dist.barrier()
    return function(*args, **kwargs)


def _rank(connection: Connection) -> None:
    from forks_imports import CACHES

    tear_down = ranks._tear_down

    def forget_everything() -> None:
        for cache in CACHES:  # frozen, so that the pool does not find them
            if cache.__module__.startswith("megatron."):
                cache.cache_clear()
        tear_down()

    ranks._tear_down = forget_everything
    with ranks._environment(ranks._WORKER_ENVIRONMENT, ranks._LAUNCHER_VARIABLES):
        ranks._serve(connection)


class Forked:
    """A running command; offers what tests use of :class:`subprocess.Popen` with text.

    Args:
        command: what would follow ``python``: a script, or ``-c`` and a program, and its arguments.
        environment: all of it (default: this process's).
        cwd: where it runs.
        stderr: ``subprocess.STDOUT`` for one stream.
        start_new_session: whether it leads a process group, to be killed as one.
    """

    def __init__(
        self,
        command: Sequence[object],
        environment: Mapping[str, str] | None = None,
        *,
        cwd: Path = ROOT,
        stderr: int | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = [str(word) for word in command]
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self.streams = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        if stderr == subprocess.STDOUT:
            self.streams[1] = self.streams[0]
        for path in self.streams:
            path.touch()
        everything = dict(os.environ if environment is None else environment)
        arguments = (self.args, everything, str(cwd), [str(path) for path in self.streams], start_new_session)
        self._process = fork_server().Process(target=_become, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Exit code; minus the signal that killed it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it wrote, once it has ended."""
        self.wait(timeout)
        return self.streams[0].read_text(), self.streams[1].read_text()

    def send_signal(self, number: int) -> None:
        """Signal it, if it runs."""
        if self._process.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """As ``kill``."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """As ``kill -9``."""
        self.send_signal(signal.SIGKILL)


def run_forked(
    command: Sequence[object],
    environment: Mapping[str, str] | None = None,
    *,
    cwd: Path = ROOT,
    timeout: float = 250,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` of Python with this command, its output captured as text."""
    process = Forked(command, environment, cwd=cwd)
    try:
        said = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.wait(), *said)


def fork_ranks(
    num_ranks: int,
    command: Sequence[object],
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> list[Forked]:
    """The ranks that torchrun would start on one node, without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    base = dict(os.environ if environment is None else environment) | world
    return [
        Forked(command, base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(num_ranks)
    ]


def run_ranks(
    num_ranks: int,
    command: Sequence[object],
    environment: Mapping[str, str] | None = None,
    *,
    timeout: float = 250,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` of torchrun: the first exit code that is not 0, and all output."""
    started = fork_ranks(num_ranks, command, environment)
    try:
        said = [rank.communicate(timeout) for rank in started]
    finally:
        for rank in started:
            rank.kill()
    code = next((code for rank in started if (code := rank.wait())), 0)
    return subprocess.CompletedProcess(started[0].args, code, *map("".join, zip(*said, strict=True)))


def run_as_typed(
    argv: Sequence[str], env: Mapping[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """Instead of the ``subprocess.run`` of an example: its commands are forked, those of torchrun, too."""
    python, *command = argv
    assert Path(python).name.startswith("python")
    if command[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]:
        done = run_ranks(int(command[4]), command[5:], env)
    else:
        done = run_forked(command, env)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    if check:
        done.check_returncode()
    return done


def _become(
    command: list[str], environment: dict[str, str], cwd: str, streams: list[str], leads: bool
) -> None:
    """In a fork: be the program."""
    if leads:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate((os.devnull, *streams)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND
        os.dup2(os.open(path, flags), number)
    if "PYTHONFAULTHANDLER" in environment:
        faulthandler.enable()
    multiprocessing.get_context = forked_for_spawned  # type: ignore[assignment]
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = program = types.ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), vars(program))
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        runpy.run_path(command[0], run_name="__main__")
