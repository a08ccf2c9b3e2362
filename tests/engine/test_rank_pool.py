from __future__ import annotations

import os

import engine_cases
import pytest

from megatron_tokedit.testing.models import tiny_model
from megatron_tokedit.testing.ranks import RankFailure, RankPool


def total(amount):
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([float(amount + dist.get_rank())])
    dist.all_reduce(tensor)
    return tensor.item()


def one_rank_fails():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("rank one is unhappy")
    total(0)


def hang():
    import time

    time.sleep(60)


def die():
    os._exit(3)


def test_every_call_has_its_own_group(ranks):
    assert ranks.run(total, 1, world_size=2) == [3.0, 3.0]
    assert ranks.run(total, 1, world_size=3) == [6.0, 6.0, 6.0]
    assert ranks.run(total, 1, world_size=1) == [1.0]


def test_failure_reports_the_traceback_and_leaves_the_pool_usable(ranks):
    with pytest.raises(RankFailure, match="rank one is unhappy"):
        ranks.run(one_rank_fails, world_size=2)
    assert ranks.run(total, 1, world_size=2) == [3.0, 3.0]


def test_hanging_and_dying_ranks_are_replaced():
    pool = RankPool()
    try:
        with pytest.raises(RankFailure, match="did not finish in time"):
            pool.run(hang, world_size=1, timeout_seconds=0.5)
        with pytest.raises(RankFailure, match="the process died"):
            pool.run(die, world_size=1)
        assert pool.run(total, 4, world_size=1) == [4.0]
    finally:
        pool.close()


def count_threads():
    return len(os.listdir(f"/proc/{os.getpid()}/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list threads")
def test_groups_of_a_trained_model_are_freed(ranks):
    """Every group has threads, and every layout many groups; those of experts are the hardest to free."""
    counts = []
    for _ in range(3):
        ranks.run(engine_cases.train_straight, tiny_model("mixtral"), 1, tp=2, world_size=2,
                  layout={"sequence_parallel": True})  # fmt: skip
        counts.append(max(ranks.run(count_threads, world_size=2)))
    assert counts[2] <= counts[0]
