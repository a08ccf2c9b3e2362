"""Hands every step its microbatches, over the changes of the global batch size.

Invariant: the samples of a step depend on the samples consumed before it only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_tokedit.config.batch_sizes import batch_size_at, batch_stages
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset.batches import BatchShape, microbatches
from megatron_tokedit.engine.initialize import ParallelContext


def full_shape(config: RunConfig, ctx: ParallelContext) -> BatchShape:
    """A whole global batch of ``training.global_batch_size``."""
    training = config.training
    return BatchShape(training.global_batch_size, training.micro_batch_size, ctx.dp_size, ctx.dp_rank)


def packs_rows(config: RunConfig) -> bool:
    """Whether a row of a batch holds several conversations that are kept apart."""
    return config.stage == "sft" and config.sft.packing


class BatchFeed:
    """This rank's microbatches of a run's training samples. Not collective."""

    def __init__(self, dataset: Any, config: RunConfig, ctx: ParallelContext) -> None:
        """Read from ``dataset``, whose samples have the run's own numbers."""
        self._dataset, self._config = dataset, config
        self._num_samples = len(dataset)
        self._pin_memory = ctx.device.type == "cuda"
        self._full = full_shape(config, ctx)
        self._shape: BatchShape | None = None
        self._batches: Iterator[Mapping[str, Any]] = iter(())

    def __len__(self) -> int:
        """One past the last sample."""
        return self._num_samples

    def at(self, *, step: int, consumed_samples: int) -> tuple[BatchShape, Iterator[Mapping[str, Any]]]:
        """Shape and microbatches of the step after ``step`` steps that consumed ``consumed_samples``.

        Call it for steps in order; what a step leaves unread would be read by the next one.
        """
        size = batch_size_at(self._config.training, consumed_samples)
        if self._shape is None or size != self._shape.global_batch_size:
            self._shape = replace(self._full, global_batch_size=size)
            stages = batch_stages(self._config.training, step=step, consumed_samples=consumed_samples)
            self._batches = microbatches(
                self._dataset,
                self._shape,
                start=consumed_samples,
                stop=min(stages[0].end_sample, self._num_samples),
                vocab_size=self._config.model.vocab_size or 0,
                num_workers=self._config.data.num_workers,
                pin_memory=self._pin_memory,
            )
        return self._shape, self._batches
