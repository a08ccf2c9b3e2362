"""The validation loss of every source, each on its own.

Invariant: the same samples each time, at most one pass over a source, and the mean is over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset.batches import BatchShape, microbatches
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.step import evaluate_loss


def validate_sources(
    model: list[Any],
    datasets: Mapping[str, Any],
    config: RunConfig,
    ctx: ParallelContext,
    shape: BatchShape,
) -> dict[str, dict[str, float]]:
    """Measure every validation source. Collective over the world.

    Args:
        model: from ``build_model``.
        datasets: one-epoch datasets by source name.
        config: resolved.
        ctx: the layout.
        shape: how a global batch is cut up.

    Returns:
        By source: ``loss`` (nats a token), ``perplexity`` and ``num_tokens``; the same on every rank.
    """
    return {name: _validate(model, dataset, config, ctx, shape) for name, dataset in datasets.items()}


def _validate(
    model: list[Any], dataset: Any, config: RunConfig, ctx: ParallelContext, shape: BatchShape
) -> dict[str, float]:
    num_samples = min(len(dataset), config.training.eval_steps * shape.global_batch_size)
    batches = microbatches(dataset, shape, start=0, stop=num_samples, vocab_size=config.model.vocab_size or 0)
    loss_sum, num_tokens = 0.0, 0
    for _ in range(math.ceil(num_samples / shape.global_batch_size)):
        batch = evaluate_loss(
            model,
            batches,
            ctx,
            num_microbatches=shape.num_microbatches,
            micro_batch_size=shape.micro_batch_size,
            seq_length=config.model.seq_length,
        )
        loss_sum += batch.loss_sum
        num_tokens += batch.num_tokens
    loss = loss_sum / max(num_tokens, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_tokens": num_tokens}
