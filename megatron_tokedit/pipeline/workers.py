"""Several processes that do units, and what happens when one of them dies.

Each worker is a fresh interpreter (spawned) with a tokenizer and a prior of its own; it is handed one unit at
a time. Invariant: which worker does a unit changes nothing of its files. A worker that dies costs its unit
only: the others go on, and the caller is told at the end.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from megatron_tokedit import log
from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import WorkUnit
from megatron_tokedit.errors import TokeditError
from megatron_tokedit.pipeline.interrupts import Interrupts
from megatron_tokedit.pipeline.placement import usable_bytes, usable_cores
from megatron_tokedit.pipeline.progress import Progress
from megatron_tokedit.pipeline.resources import JobTokenizers, PriorPlan, load_tokenizers
from megatron_tokedit.pipeline.results import UnitResult
from megatron_tokedit.pipeline.unit import UnitWorker

logger = log.get_logger(__name__)
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ANSWER_SECONDS = 0.2  # to Ctrl-C
_MEMORY_SHARE = 0.8
"""Of the memory that is free, what the workers' priors may take by default."""


@dataclass(frozen=True, slots=True)
class DeadWorker:
    """A worker that ended before its unit did."""

    unit: WorkUnit | None
    exit_code: int | None

    def __str__(self) -> str:
        code = self.exit_code
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        if self.unit is None:
            return f"a worker {how} while it started"
        return f"a worker {how} in work unit {self.unit.unit_id} ({self.unit.where})"


@dataclass(slots=True)
class _Worker:
    """A process and what it is doing."""

    process: SpawnProcess
    connection: Connection
    unit: WorkUnit | None = None


def count_workers(config: PreprocessConfig, prior: PriorPlan | None, num_units: int) -> int:
    """Processes for so many units: as configured, else what keeps the usable cores busy.

    By default a prior on a GPU has one process, one on CPU a process for every ``prior_threads`` cores, as
    many as the memory holds.
    """
    if config.workers is not None:
        wanted = config.workers
    elif prior is not None and prior.device != "cpu":
        wanted = 1
    elif prior is not None:
        cores = usable_cores(os.environ) // prior.threads
        wanted = min(cores, int(_MEMORY_SHARE * usable_bytes()) // prior.memory_bytes)
        if wanted < cores:
            logger.info(
                "memory holds %d copies of the prior, so not every core gets a worker", max(1, wanted)
            )
    else:
        wanted = usable_cores(os.environ)
    return max(1, min(wanted, num_units))


def run_in_process(
    config: PreprocessConfig,
    tokenizers: JobTokenizers,
    prior: PriorPlan | None,
    units: Sequence[WorkUnit],
    progress: Progress,
    interrupts: Interrupts,
) -> Generator[UnitResult, None, None]:
    """Do the units in this process, in order."""
    worker = UnitWorker(config, tokenizers, prior)
    for unit in units:
        interrupts.check()
        yield worker.process(unit, progress.advance)


def run_in_workers(
    config: PreprocessConfig,
    prior: PriorPlan | None,
    units: Sequence[WorkUnit],
    num_workers: int,
    progress: Progress,
    dead: list[DeadWorker],
    interrupts: Interrupts,
) -> Generator[UnitResult, None, None]:
    """Do the units in several processes, handing them out in order.

    Args:
        config: the job.
        prior: as settled by the plan.
        units: what is to be done.
        num_workers: processes.
        progress: told as groups are done.
        dead: workers that died are appended here.
        interrupts: asked several times a second.

    Yields:
        Results, in the order in which they are finished.

    Raises:
        TokeditError: the first that a worker reported; the other workers are stopped.
        KeyboardInterrupt: likewise.
    """
    waiting = list(reversed(units))
    workers: list[_Worker] = []
    try:
        with _signals_blocked():  # also in the workers: they are the parent's to answer
            for index in range(num_workers):
                workers.append(_start(config, prior, index, num_workers))
        while workers:
            by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in workers}
            ready = wait(list(by_connection), _ANSWER_SECONDS)
            interrupts.check()
            for connection in ready:
                worker = by_connection[connection]
                try:
                    kind, content = worker.connection.recv()
                except (EOFError, OSError):  # the second where it died in the middle of a message
                    worker.process.join()
                    workers.remove(worker)
                    if worker.unit is not None or worker.process.exitcode != 0:
                        dead.append(DeadWorker(worker.unit, worker.process.exitcode))
                    continue
                if kind == "progress":
                    progress.advance(*content)
                    continue
                if kind == "error":
                    raise content
                worker.unit = waiting.pop() if waiting else None
                with suppress(OSError):  # it died meanwhile; the next wait finds out
                    worker.connection.send(worker.unit)
                if kind == "done":
                    yield content
    finally:
        _stop(workers)


def _start(config: PreprocessConfig, prior: PriorPlan | None, index: int, num_workers: int) -> _Worker:
    """Start one worker."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, config, prior, index, num_workers), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Hold back what asks a job to stop, in this thread and in the processes that are started in the block.

    Schedulers and launchers send it to all processes at once; a worker that died of it would look like one
    that failed.
    """
    own = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        # multiprocessing would start it later on, and it unblocks SIGINT and SIGTERM
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, own)


def _stop(workers: Sequence[_Worker]) -> None:
    """End the workers that are still there."""
    for worker in workers:
        worker.process.kill()  # a worker holds SIGTERM back, and has nothing to tidy up
    for worker in workers:
        worker.process.join()


def _work(
    connection: Connection, config: PreprocessConfig, prior: PriorPlan | None, index: int, num_workers: int
) -> None:
    """The life of a worker: ask for a unit, do it, say so, until there is none."""
    log.configure(quiet=True)
    logging.getLogger(log.ROOT_NAME).setLevel(logging.ERROR)  # the parent has given the warnings already
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if prior is not None and prior.device != "cpu":
        _choose_gpu(num_workers, index)
    try:
        worker = UnitWorker(config, load_tokenizers(config), prior)
        connection.send(("ready", None))
        while (unit := connection.recv()) is not None:
            result = worker.process(
                unit, lambda documents, tokens: connection.send(("progress", (documents, tokens)))
            )
            connection.send(("done", result))
    except (EOFError, BrokenPipeError):  # the parent is gone
        return
    except (TokeditError, OSError) as error:
        connection.send(("error", error))
    except Exception:  # noqa: BLE001 - a bug of ours: the parent shows the worker's traceback
        connection.send(("error", RuntimeError(f"a worker failed:\n{traceback.format_exc()}")))


def _die_with_parent() -> None:
    """End this process when its parent ends, however it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _choose_gpu(num_workers: int, index: int) -> None:
    """Spread this node's workers over its GPUs; must run before CUDA is initialised."""
    import torch

    count = torch.cuda.device_count()
    if count:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        os.environ["LOCAL_RANK"] = str((local_rank * num_workers + index) % count)
