"""What happens when memory runs out: less at a time, and on.

Invariant: a result never depends on whether memory ran out on the way, beyond float rounding; what cannot be
made smaller is a :class:`PriorError` that names the settings to lower. Work is retried outside the ``except``
block, so that the tensors of the failed try are free by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import torch

from megatron_tokedit.errors import PriorError
from megatron_tokedit.log import get_logger
from megatron_tokedit.scoring.batches import Batch
from megatron_tokedit.scoring.windows import Window

logger = get_logger(__name__)

Result = TypeVar("Result")
_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc")
"""Torch's CPU allocator has no exception of its own, only a RuntimeError with one of these."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or in main memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MESSAGES)


def attempt(work: Callable[[], Result]) -> Result | None:
    """Do some work; None where memory ran out. Everything else that goes wrong is raised."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


class Partners(Protocol):
    """Processes that make a forward pass together, as one of them sees it."""

    def attempt(self, batch: Batch, work: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """Make a pass over a batch; None in all of them where memory ran out in one. Collective."""


def halves_of(batches: Iterable[Sequence[Window]]) -> list[Sequence[Window]]:
    """Batches for which memory did not suffice, in halves.

    Raises:
        PriorError: one of them is a single window.
    """
    halves = []
    for windows in batches:
        if len(windows) == 1:
            raise PriorError(
                "out of memory in the prior's forward pass of a single window of "
                f"{windows[0].num_tokens} tokens; lower --prior-context (and --prior-batch-tokens), "
                "start fewer workers, or give --prior-dtype bfloat16"
            )
        half = len(windows) // 2
        halves += [windows[:half], windows[half:]]
    return halves


class ChunkLimit:
    """How many rows the head takes at a time; halves when memory runs out and stays there.

    Args:
        rows: to begin with; at least one is taken.
    """

    def __init__(self, rows: int) -> None:
        self.rows = max(1, rows)
        self._has_warned = False

    def run(self, num_rows: int, work: Callable[[int, int], Result]) -> list[Result]:
        """Call ``work(start, stop)`` over consecutive chunks of ``num_rows`` rows.

        Raises:
            PriorError: there is not even memory for one row.
        """
        results: list[Result] = []
        start = 0
        while start < num_rows:
            stop = min(start + self.rows, num_rows)
            result = self._attempt(work, start, stop)
            if result is not None:
                results.append(result)
                start = stop
        return results

    def _attempt(self, work: Callable[[int, int], Result], start: int, stop: int) -> Result | None:
        """One chunk; None, and fewer rows from now on, where memory ran out."""
        result = attempt(lambda: work(start, stop))
        if result is None:
            if stop - start == 1:
                raise PriorError(
                    "out of memory with the logits of a single token: the prior leaves too little free; "
                    "lower --prior-batch-tokens or --prior-context, start fewer workers, or give "
                    "--prior-dtype bfloat16"
                )
            self.rows = (stop - start) // 2
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "out of memory in the prior's head: going on with %d rows at a time and fewer where "
                    "needed; a lower --prior-logits-bytes avoids this",
                    self.rows,
                )
        return result
