"""One training step and the loss of a batch, through megatron-core's pipeline schedules.

The loss is exact: the sum of the token losses over all unmasked tokens of the global batch (all microbatches
of all data-parallel ranks) divided by their number, and the gradient is the gradient of just that.
Invariant: loss and gradient norm are the same under every (tensor, pipeline, data) layout, up to float
rounding, and every rank gets them.

Legend: B rows of a microbatch, T positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_tokedit.engine import cpu_device
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.model import gather_parameters

Batch = Mapping[str, torch.Tensor]
"""A microbatch as megatron-core's ``GPTDataset`` yields it: ``tokens``, ``labels``, ``position_ids`` (int64
``[B, T]``), ``loss_mask`` (float32 ``[B, T]``) and, only where documents are masked from each other,
``attention_mask`` (bool ``[B, 1, T, T]``, True = forbidden). Other keys are ignored. In a packed batch every
position id 0 begins a sequence that neither sees nor is seen by another."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one training step did; the same on every rank.

    Attributes:
        loss: mean negative log-likelihood a token, in nats; may be NaN or infinite.
        grad_norm: global norm of the gradient before clipping.
        skipped: no update was made because loss or gradient was not finite.
        num_tokens: unmasked tokens of the global batch.
        votes: the ranks' votes, added up.
        bad_microbatches: (microbatch, data-parallel rank) of every loss that is not finite; empty where it
            is the gradient alone.
    """

    loss: float
    grad_norm: float
    skipped: bool
    num_tokens: int
    votes: tuple[int, ...] = ()
    bad_microbatches: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class LossSum:
    """Sum of token losses, unmasked tokens of the global batch, and votes; the same on every rank."""

    loss_sum: float
    num_tokens: int
    votes: tuple[int, ...] = ()


class _Totals:
    """A batch's :class:`LossSum` on its way to the host, and the microbatches' own, still on the device.

    Reading it waits for the work queued before it was made, not for what was queued since.
    """

    def __init__(self, totals: torch.Tensor, losses: list[torch.Tensor]) -> None:
        self.losses = losses
        self._host, self._arrived = totals, None
        if totals.is_cuda:
            self._host = torch.empty_like(totals, device="cpu", pin_memory=True)
            self._host.copy_(totals, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> LossSum:
        """The numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss_sum, num_tokens, *votes = self._host.tolist()
        return LossSum(loss_sum, int(num_tokens), tuple(map(int, votes)))


def _masked_loss(
    loss_mask: torch.Tensor, loss: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """megatron-core's triple: loss to differentiate, number of tokens, and what to report ([sum, number])."""
    mask = loss_mask.reshape(-1).float()
    loss_sum = torch.dot(loss.reshape(-1).float(), mask)
    num_tokens = mask.sum()
    return loss_sum, num_tokens.to(torch.int), torch.stack((loss_sum.detach(), num_tokens))


def _forward(ctx: ParallelContext, packed: bool) -> Any:
    """The ``forward_step_func`` of megatron-core's schedules, for batches on any device.

    Under context parallelism a rank keeps its two pieces of every sequence, as megatron-core cuts them. The
    rows of a packed batch become one; every pipeline stage reads the batch, and finds the borders in it.
    """
    from megatron.core.utils import get_batch_on_this_cp_rank

    def forward(batches: Iterator[Batch], module: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        more: dict[str, Any] = {}
        if packed:
            from megatron_tokedit.engine.packing import flat_rows

            batch, more["packed_seq_params"] = flat_rows(batch, ctx.device)
        on_device = {
            key: batch[key].to(ctx.device, non_blocking=True)
            for key in ("tokens", "labels", "position_ids", "loss_mask", "attention_mask")
            if key in batch
        }
        if ctx.cp_size > 1:
            on_device = get_batch_on_this_cp_rank(on_device)
        output = module(
            on_device["tokens"],
            on_device["position_ids"],
            on_device.get("attention_mask"),
            labels=on_device["labels"],
            **more,
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
    packed: bool,
    votes: Callable[[], Sequence[int]],
) -> _Totals:
    """Forward (and backward) over the microbatches; every rank gets the sum over all data-parallel ranks."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    if packed:  # what pipeline stages hand to each other is one long row
        micro_batch_size, seq_length = 1, micro_batch_size * seq_length

    losses = get_forward_backward_func()(
        forward_step_func=_forward(ctx, packed),
        data_iterator=list(itertools.tee(batches, len(model))) if len(model) > 1 else batches,
        model=model,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    own_votes = votes()
    totals = torch.zeros(2 + len(own_votes), dtype=torch.float64, device=ctx.device)
    if ctx.is_last_stage and ctx.tp_rank == 0:
        totals[:2] = torch.stack(losses).double().sum(dim=0)
    for index, vote in enumerate(own_votes):
        if vote:
            totals[2 + index] = vote
    if ctx.world_size > 1:
        dist.all_reduce(totals)
    return _Totals(totals, losses)


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
    schedule_increment: int = 1,
    packed: bool = False,
    votes: Callable[[], Sequence[int]] = tuple,
) -> StepResult:
    """One optimizer step. Collective over the world.

    The host waits for the device where megatron-core does: once for the number of tokens, to scale the
    gradients, and once for the gradient norm, which decides whether there is an update.

    Args:
        model: from ``build_model(..., wrap_with_ddp=True)``.
        optimizer: from ``build_optimizer``.
        scheduler: from ``build_scheduler``; advanced also when the update is skipped.
        batches: yields at least ``num_microbatches`` microbatches of this rank's data-parallel share; every
            rank of one data-parallel index must be given the same ones.
        ctx: the layout.
        num_microbatches: microbatches a data-parallel rank; may differ from step to step. With interleaved
            stages a multiple of the pipeline size.
        micro_batch_size: B.
        seq_length: T.
        schedule_increment: what the scheduler is advanced by: 1, or the tokens of the step.
        packed: rows hold several sequences, see :data:`Batch`.
        votes: asked for this rank's votes after the backward pass, as many on every rank; the sums over the
            ranks come back with the loss, at no further cost.
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
        packed=packed,
        votes=votes,
    )
    grad_norm, skipped = _update(optimizer, totals)
    scheduler.step(increment=schedule_increment)
    sums = totals.read()
    loss = sums.loss_sum / sums.num_tokens if sums.num_tokens else 0.0
    bad = () if math.isfinite(sums.loss_sum) else _bad_microbatches(totals.losses, ctx, num_microbatches)
    return StepResult(loss, grad_norm, skipped, sums.num_tokens, sums.votes, bad)


def _bad_microbatches(
    losses: list[torch.Tensor], ctx: ParallelContext, num_microbatches: int
) -> tuple[tuple[int, int], ...]:
    """(microbatch, data-parallel rank) of those whose loss is not finite. Collective over the world."""
    found = torch.zeros(ctx.dp_size, num_microbatches, dtype=torch.int32, device=ctx.device)
    if ctx.is_last_stage:
        found[ctx.dp_rank] = (~torch.stack(losses)[:, 0].isfinite()).int()
    if ctx.world_size > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return tuple((microbatch, rank) for rank, microbatch in found.nonzero().tolist())


def _update(optimizer: Any, totals: _Totals) -> tuple[float, bool]:
    """Clip and apply the gradients; returns their norm, and whether nothing was done.

    Nothing is done where the norm or the loss is not finite: an infinite loss may have a finite gradient. The
    loss is read after the norm, when it has long arrived. As megatron-core's ``ChainedOptimizer.step``, with
    the check in the middle that it makes for float16 only.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    with torch.no_grad():
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        if not (math.isfinite(grad_norm) and math.isfinite(totals.read().loss_sum)):
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
    packed: bool = False,
    votes: Callable[[], Sequence[int]] = tuple,
    is_gathered: bool = False,
) -> LossSum:
    """Loss of one global batch without dropout and without gradients. Collective over the world.

    Arguments as in :func:`train_step`; the mean loss is ``loss_sum / num_tokens``. ``is_gathered``:
    ``gather_parameters`` was called since the last step.
    """
    if not is_gathered:
        gather_parameters(model)
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
            packed=packed,
            votes=votes,
        ).read()
    finally:
        for chunk, mode in zip(model, modes, strict=True):
            chunk.train(mode)
