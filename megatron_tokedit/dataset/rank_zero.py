"""Work that one rank does for all: reading headers, building indexes, looking for a checkpoint.

Invariant: every rank gets rank 0's result, or every rank raises; none is left waiting for a rank that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megatron_tokedit.errors import TokeditError

_Result = TypeVar("_Result")


def from_rank_zero(action: Callable[[], _Result]) -> _Result:
    """Run ``action`` on rank 0 and return its (picklable) result on every rank.

    Collective over the world where a process group exists; else just a call.

    Raises:
        TokeditError: on every rank, what rank 0 raised. An error that is a bug keeps its type and traceback
            on rank 0, and the other ranks raise a TokeditError that names it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    if dist.get_rank() == 0:
        outcome, failure = _outcome(action)
        dist.broadcast_object_list([outcome], src=0)
        if failure is not None:
            raise failure
        return cast(_Result, outcome[1])
    received: list[Any] = [None]
    dist.broadcast_object_list(received, src=0)
    succeeded, value = received[0]
    if not succeeded:
        raise value
    return cast(_Result, value)


def _outcome(action: Callable[[], Any]) -> tuple[tuple[bool, Any], Exception | None]:
    """(what to tell the others, what to raise here)."""
    try:
        return (True, action()), None
    except TokeditError as error:
        return (False, error), error
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        return (False, TokeditError(f"rank 0 failed: {type(error).__name__}: {error}")), error
