"""Processes that have a copy of a model each and share a task's documents: how they exchange results.

They are not a process group, as nothing but results passes between them: each loads its model as if it were
alone, and they meet in the launcher's key-value store. Invariant: all of them make the same calls in the same
order; one that fails ends the others through the launcher.
"""

from __future__ import annotations

import datetime
import os
import pickle
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_PATIENCE = datetime.timedelta(days=14)
"""One process may have much longer documents than another; torchrun ends those that wait for a dead one."""
_POLL_SECONDS = 0.1


class Shares:
    """This process's place among those that share the documents.

    Args:
        rank: of this process.
        count: of processes.
        store: of the launcher; None where this one is alone.
    """

    def __init__(self, rank: int, count: int, store: dist.Store | None = None) -> None:
        self.rank, self.count = rank, count
        self._store: Any = store  # torch's stubs know no bytes as values
        self._num_calls = 0

    def gather(self, thing: Any) -> list[Any]:
        """Everybody's, in the order of ranks. Collective."""
        if self._store is None:
            return [thing]
        self._num_calls += 1
        self._store.set(f"{self._num_calls}/{self.rank}", pickle.dumps(thing))
        return [pickle.loads(self._store.get(f"{self._num_calls}/{rank}")) for rank in range(self.count)]

    def gather_tensors(self, tensor: torch.Tensor) -> torch.Tensor:
        """Everybody's tensor, stacked. Collective."""
        return torch.stack(self.gather(tensor))

    def leave(self) -> None:
        """Wait, in the process that may host the store, until the others need it no more. Collective."""
        if self._store is None:
            return
        num_left = self._store.add("left", 1)
        while self.rank == 0 and num_left < self.count:
            time.sleep(_POLL_SECONDS)
            num_left = self._store.add("left", 0)


ALONE = Shares(0, 1)


def join_shares(environment: Mapping[str, str] = os.environ) -> Shares:
    """Meet the other processes that torchrun started; this one alone where it was not started by it."""
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    store, rank, _ = next(rendezvous("env://", timeout=_PATIENCE))
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Shares(rank, count, dist.PrefixStore(f"tasks-{attempt}", store))
