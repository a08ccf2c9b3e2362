"""A pool of real gloo ranks that stays alive across tests.

Starting a rank means importing torch and megatron-core, which takes seconds; making a process group takes
milliseconds. Invariant: every call gets a fresh default process group among the first ``world_size``
processes and leaves none behind, whether it returned, raised or was killed.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

_WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankFailure(RuntimeError):
    """A rank raised, died or hung; the message holds every failed rank's traceback."""


@contextmanager
def _environment(changes: dict[str, str], removed: Sequence[str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    for name in removed:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _tear_down() -> None:
    """Forget the process group and megatron-core's global state.

    Models are reference cycles, megatron-core caches methods of theirs, its record of router losses lives on,
    and dispatchers to experts keep tensors of their last microbatch, whose graph no garbage collector sees
    through; all of them hold groups, each with threads and sockets of its own. Without this a pool of ranks
    grows by hundreds of threads, which cost a core although they are idle.
    """
    import torch.distributed as dist

    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import parallel_state
        from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
        from megatron.core.rerun_state_machine import destroy_rerun_state_machine

        parallel_state.destroy_model_parallel()
        parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None  # forgotten by the line above
        unset_num_microbatches_calculator()
        if router := sys.modules.get("megatron.core.transformer.moe.moe_utils"):
            router.get_moe_layer_wise_logging_tracker().clear()
        destroy_rerun_state_machine()
    for thing in gc.get_objects():
        if isinstance(thing, functools._lru_cache_wrapper) and thing.__module__.startswith("megatron."):
            thing.cache_clear()
        elif type(thing).__module__ == "megatron.core.transformer.moe.token_dispatcher":
            vars(thing).clear()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _run_task(task: dict[str, Any]) -> Any:
    import datetime

    import torch.distributed as dist

    sys.path[:] = task["sys_path"]
    os.chdir(task["cwd"])
    function, args, kwargs = pickle.loads(task["call"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{task['store']}",
        rank=task["rank"],
        world_size=task["world_size"],
        timeout=datetime.timedelta(seconds=task["timeout"]),
    )
    try:
        return function(*args, **kwargs)
    finally:
        _tear_down()


def _serve(connection: Connection) -> None:
    """A rank's main loop: a pickled task in, (ok, result or traceback) out, until it is killed."""
    warnings.filterwarnings("ignore")
    while True:
        task = connection.recv()
        try:
            answer = pickle.dumps((True, _run_task(task)))
        except BaseException:  # noqa: BLE001 - whatever a test raises is reported, and the rank lives on
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


class RankPool:
    """Keeps rank processes alive; :meth:`run` calls one function on the first few of them.

    Args:
        timeout_seconds: after this long a call is taken to hang; its processes are killed and started anew.
    """

    def __init__(self, timeout_seconds: float = 120.0) -> None:
        self.timeout_seconds = timeout_seconds
        self._ranks: list[tuple[Any, Connection]] = []
        self._scratch = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._num_calls = 0

    def _start(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        with _environment(_WORKER_ENVIRONMENT, _LAUNCHER_VARIABLES):
            while len(self._ranks) < world_size:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._ranks.append((process, ours))

    def run(
        self, function: Callable[..., Any], *args: Any, world_size: int, timeout_seconds: float | None = None,
        **kwargs: Any,
    ) -> list[Any]:  # fmt: skip
        """Call ``function(*args, **kwargs)`` on ranks ``0 .. world_size - 1`` of a fresh gloo process group.

        Args:
            function: a module-level function, also one of a test module.
            args: picklable.
            world_size: number of ranks.
            timeout_seconds: instead of the pool's.
            kwargs: picklable.

        Returns:
            The picklable result of every rank, in rank order.

        Raises:
            RankFailure: a rank raised, died, or did not finish in time.
        """
        timeout = timeout_seconds or self.timeout_seconds
        self._start(world_size)
        self._num_calls += 1
        task = {
            "call": pickle.dumps((function, args, kwargs)),
            "sys_path": list(sys.path),
            "cwd": os.getcwd(),
            "store": str(self._scratch / f"store_{self._num_calls}"),
            "world_size": world_size,
            "timeout": timeout,
        }
        ranks = self._ranks[:world_size]
        for rank, (_, connection) in enumerate(ranks):
            connection.send({**task, "rank": rank})
        answers = self._collect([connection for _, connection in ranks], time.monotonic() + timeout)
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            raise RankFailure("\n".join(failures))
        return [result for _, result in answers]

    def _collect(self, connections: list[Connection], deadline: float) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        must_restart = False
        while len(answers) < len(connections):
            pending = [connection for rank, connection in enumerate(connections) if rank not in answers]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            for rank, connection in enumerate(connections):
                if connection in ready:
                    try:
                        answers[rank] = pickle.loads(connection.recv_bytes())
                    except (EOFError, ConnectionError):
                        answers[rank] = (False, "the process died")
                        must_restart = True
            if not ready:
                for rank in range(len(connections)):
                    answers.setdefault(rank, (False, "did not finish in time and was killed"))
                must_restart = True
        if must_restart:
            self._kill()
        return [answers[rank] for rank in range(len(connections))]

    def _kill(self) -> None:
        for process, connection in self._ranks:
            with suppress(psutil.NoSuchProcess):  # a background save has one that outlives its rank
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.join()
            connection.close()
        self._ranks.clear()

    def close(self) -> None:
        """Kill all ranks and remove the scratch folder."""
        self._kill()
        shutil.rmtree(self._scratch, ignore_errors=True)
