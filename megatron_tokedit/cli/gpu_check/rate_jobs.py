"""Speed and memory of training steps and of scoring, at a size that fills one GPU's matrix units."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from megatron_tokedit.cli.gpu_check.sizes import Scale
from megatron_tokedit.config.sections import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
)

RATE_PRIOR = "rate_prior"
_UNMEASURED_STEPS = 2
_START_ID = 1


def train_rate(folder: Path, scale: Scale, *, recipe: str) -> dict[str, Any]:
    """Training steps on random tokens.

    Returns:
        ``tokens_per_second``, ``tflops``, ``mfu`` (None where the peak is not known) and what it is of,
        ``peak_memory_gib``, ``loss`` of the last step, ``parameters``.
    """
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model, flops_per_token, num_parameters
    from megatron_tokedit.engine.optimizer import build_optimizer, build_scheduler
    from megatron_tokedit.engine.step import train_step
    from megatron_tokedit.scoring.cost import peak_memory_bytes
    from megatron_tokedit.testing.models import random_batches
    from megatron_tokedit.training.throughput import device_peak

    ctx = initialize(ParallelConfig(), seed=1, standalone=True)
    model, vocab_size = ModelConfig.model_validate(scale.rate_model), scale.rate_vocab_size
    precision, parallel = PrecisionConfig.model_validate({"recipe": recipe}), ParallelConfig()
    settings = OptimizerConfig(lr=1e-4)
    chunks = build_model(model, precision, ctx, vocab_size, parallel=parallel, wrap_with_ddp=True)
    for chunk in chunks:
        chunk.train()
    optimizer = build_optimizer(settings, precision, parallel, chunks, ctx)
    num_steps = scale.rate_steps + _UNMEASURED_STEPS
    scheduler = build_scheduler(settings, ScheduleConfig(), optimizer, train_steps=num_steps)
    sizes: dict[str, Any] = {
        "num_microbatches": scale.rate_microbatches,
        "micro_batch_size": 1,
        "seq_length": model.seq_length,
    }
    batches = random_batches(vocab_size, **sizes)
    seconds, loss = [], 0.0
    for _ in range(num_steps):
        begin = time.perf_counter()
        result = train_step(chunks, optimizer, scheduler, batches, ctx, **sizes)
        loss = result.loss  # the result is on the host: the step is done
        seconds.append(time.perf_counter() - begin)
    step_seconds = statistics.median(seconds[_UNMEASURED_STEPS:])
    rate = scale.rate_microbatches * model.seq_length / step_seconds
    tflops = rate * flops_per_token(model, vocab_size) / 1e12
    peak = device_peak(ctx.device, recipe, None)
    return {
        "tokens_per_second": rate,
        "tflops": tflops,
        "mfu": tflops / peak.tflops if peak.tflops else None,
        "peak_tflops": peak.tflops,
        "peak_source": peak.source,
        "peak_memory_gib": round(peak_memory_bytes(ctx.device) / 2**30, 2),
        "loss": loss,
        "parameters": num_parameters(model, vocab_size),
    }


def write_rate_prior(folder: Path, scale: Scale) -> dict[str, Any]:
    """A checkpoint with random weights for :func:`score_rate`."""
    from megatron_tokedit.engine import checkpoint
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model, num_parameters

    ctx = initialize(ParallelConfig(), seed=1, standalone=True)
    model = ModelConfig.model_validate(scale.rate_model).resolved(scale.rate_vocab_size)
    precision = PrecisionConfig(recipe="bf16")
    chunks = build_model(
        model, precision, ctx, scale.rate_vocab_size, parallel=ParallelConfig(), wrap_with_ddp=False
    )
    checkpoint.save(
        folder / RATE_PRIOR / "checkpoints",
        model=chunks,
        optimizer=None,
        scheduler=None,
        state={"step": 1, "vocab_size": scale.rate_vocab_size},
        run_config={"model": model.model_dump(), "precision": precision.model_dump()},
        ctx=ctx,
    )
    return {"parameters": num_parameters(model, scale.rate_vocab_size)}


def score_rate(folder: Path, scale: Scale, *, dtype: str) -> dict[str, Any]:
    """Score random documents as long as the context; a first batch of them is not measured.

    Returns:
        ``tokens_per_second``, ``tflops``, ``share`` of the measured matrix-product rate, which is
        ``product_tflops``, ``peak_memory_gib``, ``finite``.
    """
    import numpy as np

    from megatron_tokedit.scoring.cost import measure_rate
    from megatron_tokedit.scoring.load import identify_prior, load_scorer, scoring_options

    identity = identify_prior(str(folder / RATE_PRIOR))
    options = scoring_options(
        identity, start_id=_START_ID, batch_tokens=scale.rate_batch_tokens, logits_bytes=1 << 30
    )
    scorer = load_scorer(identity, options, dtype=dtype)
    random = np.random.default_rng(0)
    length = options.context_tokens - 1
    documents = [
        random.integers(2, identity.vocab_size, length).astype(np.int32) for _ in range(scale.rate_documents)
    ]
    first = scorer.score(documents[: max(1, scale.rate_batch_tokens // length)])
    rate = measure_rate(scorer, documents)
    return {
        "tokens_per_second": rate.tokens_per_second,
        "tflops": rate.tokens_per_second * rate.flops_per_token / 1e12,
        "share": rate.share_of_device_rate,
        "product_tflops": rate.device_flops / 1e12,
        "peak_memory_gib": round(rate.peak_memory_bytes / 2**30, 2),
        "finite": bool(all(np.isfinite(score.logprobs_T).all() for score in first)),
    }
