"""The training loops that ``train_step.py`` compares: ours, bare megatron-core, a plain Hugging Face one.

Invariant: all train a model of one shape, in one precision, on the same batches.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from shapes import Shape, hf_model

from megatron_tokedit.config.sections import (
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
)
from megatron_tokedit.engine import cpu_device
from megatron_tokedit.engine import model as engine_model
from megatron_tokedit.engine import precision as precision_recipes
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.layers import uses_transformer_engine
from megatron_tokedit.engine.optimizer import build_optimizer, build_scheduler
from megatron_tokedit.engine.step import train_step
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.testing.models import random_batches

Step = Callable[[], object]
PLAIN_RECIPES = ("fp32", "bf16")
"""Recipes that the plain loop has too."""


@dataclass(frozen=True, slots=True)
class Job:
    """What all contestants train."""

    args: argparse.Namespace
    shape: Shape
    parallel: ParallelConfig
    ctx: ParallelContext

    @property
    def num_tokens(self) -> int:
        """Tokens of a step, on all ranks."""
        args = self.args
        rows = args.microbatches * args.micro_batch_size * self.ctx.dp_size
        return int(rows * self.shape.model.seq_length)

    def batches(self) -> Iterator[Any]:
        """The same microbatches again and again."""
        source = random_batches(
            self.shape.vocab_size,
            num_microbatches=self.args.microbatches * self.ctx.dp_size,
            micro_batch_size=self.args.micro_batch_size,
            seq_length=self.shape.model.seq_length,
            dp_rank=self.ctx.dp_rank,
            dp_size=self.ctx.dp_size,
        )
        return itertools.cycle(list(itertools.islice(source, self.args.microbatches)))

    @property
    def sizes(self) -> dict[str, int]:
        """Of a step, as megatron-core's schedules and ours want them."""
        return {
            "num_microbatches": self.args.microbatches,
            "micro_batch_size": self.args.micro_batch_size,
            "seq_length": self.shape.model.seq_length,
        }


def ours(job: Job, recipe: str) -> Step:
    """The package's own step."""
    precision, settings = PrecisionConfig(recipe=recipe), OptimizerConfig(lr=1e-3)
    chunks = engine_model.build_model(
        job.shape.model, precision, job.ctx, job.shape.vocab_size, parallel=job.parallel, wrap_with_ddp=True
    )
    optimizer = build_optimizer(settings, precision, job.parallel, chunks, job.ctx)
    scheduler = build_scheduler(settings, ScheduleConfig(), optimizer, train_steps=10_000)
    batches = job.batches()
    return lambda: train_step(chunks, optimizer, scheduler, batches, job.ctx, **job.sizes).loss


def bare_model(job: Job, precision: PrecisionConfig) -> Any:
    """megatron-core's GPTModel with its own layer spec, in its own wrappers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer.module import Float16Module

    model, ctx = job.shape.model, job.ctx
    traits = model.family_traits
    config = engine_model.transformer_config(model, precision, job.parallel, ctx.device)
    spec = (
        specs.get_gpt_layer_with_transformer_engine_spec()
        if uses_transformer_engine(ctx.device)
        else specs.get_gpt_layer_local_spec(normalization=traits.normalization)
    )
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=engine_model.padded_vocab_size(job.shape.vocab_size, 128, ctx.tp_size),
        max_sequence_length=model.seq_length,
        pre_process=ctx.is_first_stage,
        post_process=ctx.is_last_stage,
        share_embeddings_and_output_weights=model.ties_embeddings,
        position_embedding_type=traits.position_embedding_type,
        rotary_base=model.rotary_base,
    ).to(ctx.device)
    gpt = Float16Module(config, gpt) if config.bf16 else gpt
    return engine_model._wrap_with_ddp([gpt], config, precision, job.parallel, ctx)[0]


def bare(job: Job, recipe: str) -> Step:
    """megatron-core's own example loop: GPTModel, DDP, get_megatron_optimizer."""
    from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    precision, device = PrecisionConfig(recipe=recipe), job.ctx.device
    module = bare_model(job, precision)
    fields = precision_recipes.resolve(precision, device, job.parallel).optimizer
    with cpu_device.cuda_type_names():
        optimizer = get_megatron_optimizer(
            CoreOptimizerConfig(lr=1e-3, weight_decay=0.1, use_distributed_optimizer=True, **fields),
            [module],
            use_gloo_process_groups=False,
        )
    batches, length = job.batches(), job.shape.model.seq_length
    causal = None  # Transformer Engine's layers know it themselves
    if not uses_transformer_engine(device):
        causal = (torch.ones(length, length, device=device).tril() < 0.5)[None, None]

    def forward(source: Iterator[Any], chunk: Any) -> Any:
        batch = {key: value.to(device, non_blocking=True) for key, value in next(source).items()}
        output = chunk(batch["tokens"], batch["position_ids"], causal, labels=batch["labels"])

        def loss_func(loss: torch.Tensor) -> Any:
            total = (loss.float() * batch["loss_mask"]).sum()
            count = batch["loss_mask"].sum().int()
            return total, count, total.detach() / count

        return output, loss_func

    def step() -> float:
        module.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=batches,
            model=[module],
            forward_only=False,
            **job.sizes,
        )
        with cpu_device.cuda_type_names():
            optimizer.step()
        return float(sum(losses)) / len(losses) if losses else 0.0

    return step


def hugging_face(job: Job, recipe: str) -> Step:
    """A Hugging Face model of the same shape in a plain torch loop."""
    if recipe not in PLAIN_RECIPES:
        raise ConfigError(f"Hugging Face's loop has no recipe {recipe}")
    device = job.ctx.device
    with device:
        network = hf_model(job.shape)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    batches = job.batches()

    def step() -> float:
        total = 0.0
        optimizer.zero_grad()
        for _ in range(job.args.microbatches):
            batch = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe == "bf16"):
                logits = network(batch["tokens"]).logits
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none"
            )
            mask = batch["loss_mask"].flatten()
            loss = (nll * mask).sum() / mask.sum() / job.args.microbatches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return total

    return step


MAKERS = {"ours": ours, "bare": bare, "hf": hugging_face}
