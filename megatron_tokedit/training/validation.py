"""The validation loss of every source, each on its own, and of the domains that sources belong to.

Invariant: the same samples each time, at most one pass over a source, and the mean is over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset.batches import microbatches
from megatron_tokedit.dataset.sources import domains_of
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.model import gather_parameters
from megatron_tokedit.engine.step import LossSum, evaluate_loss
from megatron_tokedit.training.feed import full_shape, packs_rows
from megatron_tokedit.training.signals import StopRequest


def validate_sources(
    model: list[Any],
    datasets: Mapping[str, Any],
    config: RunConfig,
    ctx: ParallelContext,
    stop: StopRequest,
) -> tuple[dict[str, dict[str, float]], str | None]:
    """Measure every validation source, and every domain over all tokens of its sources.

    Collective over the world. Ends after the batch in which a rank is asked to stop.

    Args:
        model: from ``build_model``.
        datasets: one-epoch datasets by source name.
        config: resolved.
        ctx: the layout.
        stop: asked for this rank's votes.

    Returns:
        By source, and by ``domain DOMAIN``: ``loss`` (nats a token), ``perplexity`` and ``num_tokens``; and
        why it ended early, in which case the numbers are not whole. The same on every rank.
    """
    gather_parameters(model)
    sums: dict[str, LossSum] = {}
    for name, dataset in datasets.items():
        sums[name], reason = _sum_losses(model, dataset, config, ctx, stop)
        if reason is not None:
            return {}, reason
    results = {name: _mean(total.loss_sum, total.num_tokens) for name, total in sums.items()}
    for domain, names in domains_of(config.data).items():
        members = [sums[name] for name in names]
        results[f"domain {domain}"] = _mean(
            sum(member.loss_sum for member in members), sum(member.num_tokens for member in members)
        )
    return results, None


def _mean(loss_sum: float, num_tokens: int) -> dict[str, float]:
    loss = loss_sum / max(num_tokens, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_tokens": num_tokens}


def _sum_losses(
    model: list[Any], dataset: Any, config: RunConfig, ctx: ParallelContext, stop: StopRequest
) -> tuple[LossSum, str | None]:
    shape = full_shape(config, ctx)
    num_samples = min(len(dataset), config.training.eval_steps * shape.global_batch_size)
    batches = microbatches(dataset, shape, start=0, stop=num_samples, vocab_size=config.model.vocab_size or 0)
    loss_sum, num_tokens, reason = 0.0, 0, None
    for _ in range(math.ceil(num_samples / shape.global_batch_size)):
        batch = evaluate_loss(
            model,
            batches,
            ctx,
            num_microbatches=shape.num_microbatches,
            micro_batch_size=shape.micro_batch_size,
            seq_length=config.model.seq_length,
            packed=packs_rows(config),
            votes=stop.votes,
            is_gathered=True,
        )
        loss_sum += batch.loss_sum
        num_tokens += batch.num_tokens
        reason = stop.outcome(batch.votes)
        if reason is not None:
            break
    return LossSum(loss_sum, num_tokens), reason
