"""The processes that hold one copy of a prior: how they meet, hear of each other, and end.

A replica is a process group of its own; replicas have nothing in common but the launcher. Its first process
leads and says to the others what comes next (``replica`` has what there is to say).

Invariant: nobody waits for ever. A process that fails says why in the launcher's key-value store and ends;
whoever waits for it fails too, and says what it said. One that ends without a word ends the others as their
connections to it break, or at the latest with the process group's timeout.
"""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_tokedit.errors import PriorError, TokeditError
from megatron_tokedit.log import get_logger
from megatron_tokedit.scoring.identity import PriorLayout
from megatron_tokedit.scoring.memory import is_out_of_memory

logger = get_logger(__name__)

_PATIENCE = datetime.timedelta(days=14)
"""The leader may read text for hours between two calls; a broken connection ends the wait."""
_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
_WATCH_SECONDS, _GRACE_SECONDS = 1.0, 10.0
_LAST_WORDS_SECONDS = 3.0
_FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Leave:
    """There is nothing more to do; with a message: because the leader failed."""

    message: str | None = None


class Vote:
    """What all processes say to one question, on its way. Without a question all agree.

    Args:
        is_against: one number, other than 0 where a process is against.
        work: that brings it.
    """

    def __init__(self, is_against: torch.Tensor | None = None, work: dist.Work | None = None) -> None:
        self._is_against, self._work = is_against, work

    def is_unanimous(self) -> bool:
        """Wait for everybody; whether nobody is against."""
        if self._is_against is None or self._work is None:
            return True
        self._work.wait()
        return not bool(self._is_against.item())


class Replica:
    """This process's place in a replica; as a context manager it tells the others how it ended.

    Args:
        layout: of the replica; the default process group has as many ranks.
        index: the replica's number, for messages.
        store: that the processes of this replica share.
        device: of this process.
        launcher: the store of all that the launcher started, where the process group was made for this.
    """

    def __init__(
        self,
        layout: PriorLayout,
        *,
        index: int,
        store: dist.Store,
        device: torch.device,
        launcher: dist.Store | None = None,
    ) -> None:
        assert dist.get_world_size() == layout.num_ranks, "a replica is the whole process group"
        self.layout, self.index, self.device = layout, index, device
        self._store, self._launcher = store, launcher
        self._leader = _leader(layout)
        self._commands = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.rank = (dist.get_rank() - self._leader) % layout.num_ranks
        self._is_busy = False
        self._left = threading.Event()
        threading.Thread(target=self._watch, name="replica", daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which has the documents."""
        return self.rank == 0

    def announce(self, command: object) -> None:
        """Tell the others what comes. By the leader."""
        dist.broadcast_object_list([command], src=self._leader, group=self._commands)

    def hear(self) -> object:
        """What comes, whenever the leader says it. By all others."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=self._leader, group=self._commands)
        command: object = heard[0]
        return command

    def vote(self, is_for: bool) -> Vote:
        """Say whether something went well here, to hear later whether it did everywhere. By all, in order."""
        is_against = torch.tensor([0 if is_for else 1])
        maximum = dist.ReduceOp.MAX
        work = dist.all_reduce(is_against, maximum, group=self._commands, async_op=True)
        return Vote(is_against, work)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all processes do together: a failure here ends the others, one there is raised here.

        Raises:
            PriorError: another process failed, or memory ran out, which the others would wait for in vain.
        """
        self._is_busy = True
        try:
            yield
        except TokeditError as error:
            self._say(str(error))
            raise
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                message = (
                    "out of memory in the prior, where its processes cannot go on in halves; lower "
                    "--prior-batch-tokens or --prior-logits-bytes, or raise --prior-tensor-parallel"
                )
                self._say(message)
                raise PriorError(message) from error
            if reason := self._last_words():
                raise PriorError(reason) from error
            if not _is_of_connection(error):
                self._say(f"{type(error).__name__}: {error}")
                raise
            raise PriorError(
                f"another process of replica {self.index} of the prior ended without a word (killed, out of "
                f"memory?), or its node is gone; run the same command again ({_first_line(error)})"
            ) from error
        except BaseException as error:
            self._say(type(error).__name__)
            raise
        self._is_busy = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.leads and not self._is_busy:
            message = None if error is None else str(error) or type(error).__name__
            with suppress(RuntimeError):  # they may be gone already
                self.announce(Leave(message))
        self._left.set()
        if self._launcher is not None and error is None:
            dist.destroy_process_group()
            _leave(self._launcher)

    def _say(self, message: str) -> None:
        """Leave word of a failure, unless somebody has been first."""
        with suppress(RuntimeError):  # the launcher is gone, and so are the others
            self._store.compare_set(_FAILURE, "", f"{self.rank} {message}")

    def _heard(self) -> tuple[int, str] | None:
        """Who failed first, and why."""
        if not self._store.check([_FAILURE]):
            return None
        rank, _, message = self._store.get(_FAILURE).decode().partition(" ")
        return int(rank), message

    def _last_words(self) -> str | None:
        """Why another process failed; its word may be on the way."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        with suppress(RuntimeError):
            while (heard := self._heard()) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if heard is not None and heard[0] != self.rank:
                return f"process {heard[0]} of replica {self.index} of the prior failed: {heard[1]}"
        return None

    def _watch(self) -> None:
        """End this process where another failed and this one, waiting for it, does not notice.

        On a GPU it waits for kernels that wait for it, and a meeting of a new group waits for the store.
        """
        deadline = None
        while not self._left.wait(_WATCH_SECONDS):
            try:
                heard = self._heard()
            except RuntimeError:  # the launcher is gone
                return
            if heard is None or heard[0] == self.rank:
                continue
            deadline = deadline or time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > deadline:
                logger.error("process %d of replica %d failed: %s", heard[0], self.index, heard[1])
                os._exit(1)


def join(layout: PriorLayout, *, index: int, rank: int, device: torch.device) -> Replica:
    """Meet the other processes of a replica, which torchrun started beside this one.

    Args:
        layout: processes of a replica.
        index: the replica's number among all that this launcher started.
        rank: this process's number in it; 0 leads.
        device: of this process, its own.

    Raises:
        PriorError: they did not come.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        everybody, _, _ = next(rendezvous("env://", timeout=_COLLECTIVE_TIMEOUT))
        launcher = dist.PrefixStore(f"replicas-{attempt}", everybody)
        store = dist.PrefixStore(str(index), launcher)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            # so that the process that leads is the first of the last stage, which has the log-probabilities
            rank=(rank + _leader(layout)) % layout.num_ranks,
            world_size=layout.num_ranks,
            timeout=_COLLECTIVE_TIMEOUT,
        )
        return Replica(layout, index=index, store=store, device=device, launcher=launcher)
    except dist.DistError as error:
        raise PriorError(
            f"the {layout.num_ranks} processes of replica {index} of the prior did not meet: "
            f"{_first_line(error)}"
        ) from error


def _leave(launcher: dist.Store) -> None:
    """Say that this process needs the launcher's store no more; its host waits until nobody does."""
    with suppress(RuntimeError):  # its host is gone
        num_left = launcher.add("left", 1)
        is_host = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while is_host and num_left < int(os.environ["WORLD_SIZE"]):
            time.sleep(_WATCH_SECONDS / 10)
            num_left = launcher.add("left", 0)


def _leader(layout: PriorLayout) -> int:
    """Rank in the process group of the process that leads: the first of the last stage."""
    return (layout.pipeline - 1) * layout.tensor


def _is_of_connection(error: BaseException) -> bool:
    """Whether a collective failed because of somebody else."""
    text = str(error).lower()
    words: Sequence[str] = ("gloo", "nccl", "connection", "timed out", "peer")
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
