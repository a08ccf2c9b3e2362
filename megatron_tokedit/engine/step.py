"""One training step and the loss of a batch, through megatron-core's pipeline schedules.

The loss is exact: the sum of the token losses over all unmasked tokens of the global batch (all microbatches
of all data-parallel ranks) divided by their number, and the gradient is the gradient of just that.
Invariant: loss and gradient norm are the same under every (tensor, pipeline, data) layout, up to float
rounding, and every rank gets them.

Legend: B rows of a microbatch, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_tokedit.engine import cpu_device
from megatron_tokedit.engine.initialize import ParallelContext

Batch = Mapping[str, torch.Tensor]
"""A microbatch as megatron-core's ``GPTDataset`` yields it: ``tokens``, ``labels``, ``position_ids`` (int64
``[B, T]``), ``loss_mask`` (float32 ``[B, T]``) and, only where documents are masked from each other,
``attention_mask`` (bool ``[B, 1, T, T]``, True = forbidden). Other keys are ignored."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one training step did; the same on every rank.

    Attributes:
        loss: mean negative log-likelihood a token, in nats; may be NaN or infinite.
        grad_norm: global norm of the gradient before clipping.
        skipped: no update was made because loss or gradient was not finite.
        num_tokens: unmasked tokens of the global batch.
    """

    loss: float
    grad_norm: float
    skipped: bool
    num_tokens: int


@dataclass(frozen=True, slots=True)
class LossSum:
    """Sum of token losses and number of unmasked tokens of the global batch; the same on every rank."""

    loss_sum: float
    num_tokens: int


def _masked_loss(
    loss_mask: torch.Tensor, loss: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """megatron-core's triple: loss to differentiate, number of tokens, and what to report ([sum, number])."""
    mask = loss_mask.reshape(-1).float()
    loss_sum = torch.dot(loss.reshape(-1).float(), mask)
    num_tokens = mask.sum()
    return loss_sum, num_tokens.to(torch.int), torch.stack((loss_sum.detach(), num_tokens))


def _forward(device: torch.device) -> Any:
    """The ``forward_step_func`` of megatron-core's schedules, for batches on any device."""

    def forward(batches: Iterator[Batch], module: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        on_device = {
            key: batch[key].to(device, non_blocking=True)
            for key in ("tokens", "labels", "position_ids", "loss_mask", "attention_mask")
            if key in batch
        }
        output = module(
            on_device["tokens"],
            on_device["position_ids"],
            on_device.get("attention_mask"),
            labels=on_device["labels"],
        )

        def loss_func(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return _masked_loss(on_device["loss_mask"], loss)

        return output, loss_func

    return forward


def _run(
    model: list[Any],
    batches: Iterator[Batch],
    ctx: ParallelContext,
    *,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool,
) -> LossSum:
    """Forward (and backward) over the microbatches; every rank gets the sum over all data-parallel ranks."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    losses = get_forward_backward_func()(
        forward_step_func=_forward(ctx.device),
        data_iterator=batches,
        model=model,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    totals = torch.zeros(2, dtype=torch.float64, device=ctx.device)
    if ctx.is_last_stage and ctx.tp_rank == 0:
        totals += torch.stack(losses).double().sum(dim=0)
    if ctx.world_size > 1:
        dist.all_reduce(totals)
    loss_sum, num_tokens = totals.tolist()
    return LossSum(loss_sum, int(num_tokens))


def train_step(
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    batches: Iterator[Batch],
    ctx: ParallelContext,
    *,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
) -> StepResult:
    """One optimizer step. Collective over the world.

    Args:
        model: from ``build_model(..., wrap_with_ddp=True)``.
        optimizer: from ``build_optimizer``.
        scheduler: from ``build_scheduler``; advanced by one step, also when the update is skipped.
        batches: yields at least ``num_microbatches`` microbatches of this rank's data-parallel share; every
            rank of one data-parallel index must be given the same ones.
        ctx: the layout.
        num_microbatches: microbatches a data-parallel rank.
        micro_batch_size: B.
        seq_length: T.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    totals = _run(
        model,
        batches,
        ctx,
        num_microbatches=num_microbatches,
        micro_batch_size=micro_batch_size,
        seq_length=seq_length,
        forward_only=False,
    )
    grad_norm, skipped = _update(optimizer)
    scheduler.step(increment=1)
    loss = totals.loss_sum / totals.num_tokens if totals.num_tokens else 0.0
    return StepResult(loss, grad_norm, skipped, totals.num_tokens)


def _update(optimizer: Any) -> tuple[float, bool]:
    """Clip and apply the gradients unless they are not finite; returns the norm and whether it was skipped.

    As megatron-core's ``ChainedOptimizer.step``, with the check in the middle that it makes for float16 only.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    with torch.no_grad():
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            return grad_norm, True
        clip = optimizer.config.clip_grad
        if clip > 0.0 and grad_norm > clip:
            with cpu_device.cuda_type_names():
                for part in optimizer.chained_optimizers:
                    if parameters := part.get_parameters():
                        clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=grad_norm)
        optimizer.step_with_ready_grads()
    return grad_norm, False


@torch.no_grad()
def evaluate_loss(
    model: list[Any],
    batches: Iterator[Batch],
    ctx: ParallelContext,
    *,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
) -> LossSum:
    """Loss of one global batch without dropout and without gradients. Collective over the world.

    Arguments as in :func:`train_step`; the mean loss is ``loss_sum / num_tokens``.
    """
    modes = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        return _run(
            model,
            batches,
            ctx,
            num_microbatches=num_microbatches,
            micro_batch_size=micro_batch_size,
            seq_length=seq_length,
            forward_only=True,
        )
    finally:
        for chunk, mode in zip(model, modes, strict=True):
            chunk.train(mode)
