"""Which samples a rank reads, and the loaders that read them.

Legend: ``b`` rows of a microbatch, ``s`` tokens of a sequence.

Invariant: sample ``n`` of the training dataset is in step ``n // global_batch_size`` whatever the number of
ranks, so that the position of a run is one number, the consumed samples. The order is Megatron-LM's:
microbatch ``m`` of data-parallel rank ``r`` starts at row ``(m * num_ranks + r) * micro_batch_size``.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_tokedit.errors import DataFormatError


@dataclass(frozen=True, slots=True)
class BatchShape:
    """How a global batch is cut up."""

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    data_parallel_rank: int

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one rank in one global batch."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


class MicrobatchSampler(Sampler[list[int | None]]):
    """Sample indices of one rank's microbatches, from sample ``start`` up to ``stop``.

    ``start`` is a whole number of global batches. The last global batch is filled up with None, which
    megatron-core's datasets answer with a row that is left out of the loss.
    """

    def __init__(self, shape: BatchShape, start: int, stop: int) -> None:
        self.shape, self.start, self.stop = shape, start, stop

    def __len__(self) -> int:
        num_batches = -(-(self.stop - self.start) // self.shape.global_batch_size)
        return num_batches * self.shape.num_microbatches

    def __iter__(self) -> Iterator[list[int | None]]:
        shape = self.shape
        for batch_start in range(self.start, self.stop, shape.global_batch_size):
            for microbatch in range(shape.num_microbatches):
                offset = microbatch * shape.data_parallel_size + shape.data_parallel_rank
                first = batch_start + offset * shape.micro_batch_size
                rows = range(first, first + shape.micro_batch_size)
                yield [row if row < self.stop else None for row in rows]


def microbatches(
    dataset: Dataset[dict[str, torch.Tensor]],
    shape: BatchShape,
    *,
    start: int,
    stop: int,
    vocab_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Iterate over this rank's microbatches of samples ``start`` to ``stop``.

    Args:
        dataset: a dataset of :func:`megatron_tokedit.dataset.blend.build_datasets`.
        shape: sizes and this rank's place.
        start: first sample, a whole number of global batches.
        stop: one past the last sample.
        vocab_size: of the model; ids must be below it.
        num_workers: loader processes; 0 reads in this process.
        pin_memory: for asynchronous copies to a GPU.

    Yields:
        ``tokens``, ``labels``, ``position_ids`` (int64 ``[b, s]``), ``loss_mask`` (float32 ``[b, s]``) and,
        where documents are masked from each other, ``attention_mask`` (bool ``[b, 1, s, s]``, True: hidden).

    Raises:
        DataFormatError: a token id that the model does not have.
    """
    options: dict[str, Any] = {}
    if num_workers:
        options = {"prefetch_factor": 4, "persistent_workers": True, "worker_init_fn": _ignore_signals}
    loader = DataLoader(
        dataset,
        batch_sampler=MicrobatchSampler(shape, start, stop),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else every new loader would draw from the run's random numbers
        **options,
    )
    for batch in loader:
        largest = max(int(batch["tokens"].max()), int(batch["labels"].max()))
        if largest >= vocab_size:
            raise DataFormatError(
                f"a training sample holds token id {largest}, but the model's vocabulary has {vocab_size} "
                f"ids: the dataset was written with another tokenizer"
            )
        yield batch


def _ignore_signals(worker: int) -> None:
    """A scheduler signals every process: the trainer answers, its workers go on serving it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
