"""How fast nodes send to each other: in pairs, both directions at once, each node with two partners.

A pair is a process group of its own, so that a node that hangs takes one partner's time and nobody else's.
The first partner is the next node by name, the second is half the job away: often behind another switch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from megatron_tokedit.cli.node_check.findings import NO_ANSWER

_GLOO_BYTES = 16 << 20
_GLOO_EXCHANGES = 6
_BUDGET_SECONDS = 1.5
"""Both ends stop after an exchange that began later: a slow network is known to be slow after one."""

_NCCL_BYTES = 256 << 20
_NCCL_EXCHANGES = 5

Pair = tuple[int, int]


def rounds_of(ranks: Sequence[int]) -> list[list[Pair]]:
    """Who is measured with whom: rounds in which no node occurs twice; two partners where there are two."""
    count = len(ranks)
    if count < 2:
        return []
    half, is_odd = count // 2, count % 2
    neighbors = [(2 * pair, 2 * pair + 1) for pair in range(half)]
    if count == 2:
        rounds = [neighbors]
    else:
        rounds = [neighbors, [(is_odd + pair, is_odd + pair + half) for pair in range(half)]]
        if is_odd:  # the last had no neighbor, the first no far partner
            rounds.append([(0, count - 1)])
    return [[(ranks[first], ranks[second]) for first, second in pairs] for pairs in rounds]


def measure_gloo(store: Any, rank: int, partner: int, seconds: float) -> float:
    """GB/s each way to the partner over gloo, the best of several exchanges.

    Raises:
        RuntimeError: torch's, where the partner does not answer in time.
    """
    import torch
    from torch.distributed import PrefixStore, ProcessGroupGloo

    own, other = (0, 1) if rank < partner else (1, 0)
    place = PrefixStore(_pair_name("gloo", rank, partner), store)
    group: Any = ProcessGroupGloo(place, own, 2, timedelta(seconds=seconds))
    sent = torch.zeros(_GLOO_BYTES // 8, dtype=torch.int64)
    received = torch.empty_like(sent)
    begin = time.monotonic()
    best_seconds = float("inf")
    for _ in range(_GLOO_EXCHANGES):
        elapsed = time.monotonic() - begin
        sent[0] = int(elapsed * 1e6)
        start = time.monotonic()
        for work in [group.send([sent], other, 0), group.recv([received], other, 0)]:
            work.wait(timedelta(seconds=seconds))
        best_seconds = min(best_seconds, time.monotonic() - start)
        if max(elapsed, int(received[0]) / 1e6) > _BUDGET_SECONDS:
            break
    return _GLOO_BYTES / best_seconds / 1e9


def measure_nccl(store: Any, rank: int, partner: int) -> float:
    """GB/s each way between the first GPUs of two nodes over NCCL.

    An all-reduce of two ranks moves its size in both directions. May hang where the partner does.
    """
    import torch
    from torch.distributed import PrefixStore, ProcessGroupNCCL

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    place = PrefixStore(_pair_name("nccl", rank, partner), store)
    group: Any = ProcessGroupNCCL(place, 0 if rank < partner else 1, 2, ProcessGroupNCCL.Options())
    data = torch.zeros(_NCCL_BYTES // 4, device=device)
    return _NCCL_BYTES / _best_gpu_seconds(lambda: group.allreduce([data]).wait(), _NCCL_EXCHANGES) / 1e9


def _pair_name(transport: str, rank: int, partner: int) -> str:
    return f"{transport}/{min(rank, partner)}-{max(rank, partner)}"


def measure_copies() -> float | None:
    """GB/s of the slowest copy from a GPU of this node to the next one; None where there is only one.

    All GPUs of the node are visited by one process, one after another.
    """
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return None
    rates = []
    for index in range(count):
        source = torch.zeros(_NCCL_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
        target = torch.empty_like(source, device=f"cuda:{(index + 1) % count}")
        with torch.cuda.device(index):

            def copy(source: torch.Tensor = source, target: torch.Tensor = target) -> None:
                target.copy_(source, non_blocking=True)

            rates.append(_NCCL_BYTES / _best_gpu_seconds(copy, _NCCL_EXCHANGES) / 1e9)
    return min(rates)


def _best_gpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """The shortest of several calls on the current device, after one that does not count."""
    import torch

    best = float("inf")
    for repeat in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.monotonic()
        call()
        torch.cuda.synchronize()
        if repeat:
            best = min(best, time.monotonic() - start)
    return best


def why_failed(error: BaseException) -> str:
    """What a person needs of torch's message about a pair."""
    text = str(error).strip()
    lowered = text.lower()
    if "timeout" in lowered or "timed out" in lowered:
        return NO_ANSWER
    for known in (
        "Connection refused",
        "Connection reset by peer",
        "Connection closed by peer",
        "No route to host",
    ):
        if known.lower() in lowered:
            return known[0].lower() + known[1:]
    first = re.sub(r"^\[[^]]*\] *", "", text.splitlines()[0]) if text else type(error).__name__
    return first if len(first) <= 160 else first[:157] + "..."
