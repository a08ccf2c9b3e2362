"""What the engine tests run on the ranks of the pool; module-level, so that it travels by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_tokedit.config.sections import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
)
from megatron_tokedit.testing.models import random_batches

VOCAB_SIZE = 90  # padded to 96: the last six rows must never matter
NUM_MICROBATCHES = 4  # over all data-parallel ranks
MICRO_BATCH_SIZE = 2


class Run:
    """A model, its optimizer and its data on this rank."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        optimizer: OptimizerConfig,
        seed: int = 7,
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        from megatron_tokedit.engine.initialize import initialize
        from megatron_tokedit.engine.model import build_model
        from megatron_tokedit.engine.optimizer import build_optimizer, build_scheduler

        self.config, self.precision, self.vocab_size = model, precision, vocab_size
        self.ctx = initialize(parallel, seed=seed, device="cpu")
        self.model = build_model(
            model, precision, self.ctx, vocab_size, parallel=parallel, wrap_with_ddp=True
        )
        self.optimizer = build_optimizer(optimizer, precision, parallel, self.model, self.ctx)
        schedule = ScheduleConfig(lr_warmup_steps=2)
        self.scheduler = build_scheduler(optimizer, schedule, self.optimizer, train_steps=20)
        self.restart_batches()

    def restart_batches(self) -> None:
        self.batches = random_batches(
            self.vocab_size,
            num_microbatches=NUM_MICROBATCHES,
            micro_batch_size=MICRO_BATCH_SIZE,
            seq_length=self.config.seq_length,
            dp_rank=self.ctx.dp_rank,
            dp_size=self.ctx.dp_size,
        )

    @property
    def shapes(self) -> dict[str, int]:
        return {
            "num_microbatches": NUM_MICROBATCHES // self.ctx.dp_size,
            "micro_batch_size": MICRO_BATCH_SIZE,
            "seq_length": self.config.seq_length,
        }

    def skip_batches(self, num_steps: int) -> None:
        for _ in range(num_steps * self.shapes["num_microbatches"]):
            next(self.batches)

    def steps(self, num_steps: int) -> list[tuple[float, float]]:
        from megatron_tokedit.engine.step import train_step

        results = [
            train_step(self.model, self.optimizer, self.scheduler, self.batches, self.ctx, **self.shapes)
            for _ in range(num_steps)
        ]
        assert not any(result.skipped for result in results)
        return [(result.loss, result.grad_norm) for result in results]

    def evaluate(self) -> float:
        from megatron_tokedit.engine.step import evaluate_loss

        totals = evaluate_loss(self.model, self.batches, self.ctx, **self.shapes)
        return totals.loss_sum / totals.num_tokens

    def save(self, folder: Path, step: int, **kwargs: Any) -> Path:
        from megatron_tokedit.engine import checkpoint

        return checkpoint.save(
            folder / "checkpoints",
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state={"step": step, "vocab_size": self.vocab_size},
            run_config={"model": self.config.model_dump(), "precision": self.precision.model_dump()},
            ctx=self.ctx,
            **kwargs,
        )

    def load(self, folder: Path, **kwargs: Any) -> dict[str, Any]:
        from megatron_tokedit.engine import checkpoint

        return checkpoint.load(
            folder,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            ctx=self.ctx,
            **kwargs,
        )


def start(
    model: ModelConfig,
    *,
    tp: int = 1,
    pp: int = 1,
    distributed: bool = True,
    recipe: str = "fp32",
    seed: int = 7,
    vocab_size: int = VOCAB_SIZE,
    layout: dict[str, Any] | None = None,
    **optimizer: Any,
) -> Run:
    """``layout`` holds further fields of ``ParallelConfig``."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        use_distributed_optimizer=distributed,
        **(layout or {}),
    )
    settings = OptimizerConfig(**{"lr": 1e-2, **optimizer})
    return Run(model, parallel, PrecisionConfig(recipe=recipe), settings, seed, vocab_size)


def train_and_save(
    folder: Path, model: ModelConfig, num_steps: int, **layout: Any
) -> list[tuple[float, float]]:
    run = start(model, **layout)
    results = run.steps(num_steps)
    run.save(folder, num_steps)
    return results


def load_and_train(
    folder: Path, model: ModelConfig, num_steps: int, **layout: Any
) -> list[tuple[float, float]]:
    """Loss of the first batch without an update, then the steps."""
    run = start(model, seed=99, **layout)
    run.skip_batches(run.load(folder)["step"])
    return [(run.evaluate(), 0.0), *run.steps(num_steps)]


def load_each_and_train(
    folders: dict[str, Path], model: ModelConfig, num_steps: int, **layout: Any
) -> dict[str, list[tuple[float, float]]]:
    """:func:`load_and_train` for every folder, one after the other in the same model and optimizer."""
    run = start(model, seed=99, **layout)
    results = {}
    for name, folder in folders.items():
        run.restart_batches()
        run.skip_batches(run.load(folder)["step"])
        results[name] = [(run.evaluate(), 0.0), *run.steps(num_steps)]
    return results


def train_straight(model: ModelConfig, num_steps: int, **layout: Any) -> list[tuple[float, float]]:
    return start(model, **layout).steps(num_steps)
