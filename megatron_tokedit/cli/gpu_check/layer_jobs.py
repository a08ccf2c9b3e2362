"""The machine, single layers, small models in one forward pass or two steps: what needs no training run."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tokedit.cli.gpu_check.sizes import Scale
from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.sections import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
)
from megatron_tokedit.config.sft import SftConfig

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "transformers", "triton")
_LINEAR_SHAPE = {"num_tokens": 4096, "input_size": 1024, "output_size": 2048}


def look_at_machine(folder: Path, scale: Scale) -> dict[str, Any]:
    """What the machine offers, and what it lacks for every recipe and for packed rows.

    Returns:
        ``probe`` (every field of the preflight's), ``recipes`` (name -> sentences), ``packing`` (sentences),
        ``versions``.
    """
    import torch

    from megatron_tokedit.engine import preflight

    found = preflight.probe()
    lacks = {
        name: preflight.machine_faults(PrecisionConfig(recipe=name), found, ParallelConfig())
        for name in RECIPES
    }
    fine_tuning = {
        "stage": "sft",
        "sft": SftConfig(),
        "precision": PrecisionConfig(recipe="bf16"),
        "parallel": ParallelConfig(),
    }
    packing = [str(fault) for fault in preflight.section_faults(fine_tuning, found)]
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"probe": asdict(found), "recipes": lacks, "packing": packing, "versions": versions}


def compare_linear(folder: Path, scale: Scale, *, recipe: str) -> dict[str, Any]:
    """Errors of one linear layer in bfloat16 and in FP8; see ``engine.fp8_evidence.linear_errors``."""
    from megatron_tokedit.engine.fp8_evidence import linear_errors
    from megatron_tokedit.engine.initialize import initialize

    ctx = initialize(ParallelConfig(), seed=1, device="cuda", standalone=True)
    return linear_errors(recipe, ctx, **_LINEAR_SHAPE)


def mask_documents(folder: Path, scale: Scale, *, recipe: str) -> dict[str, Any]:
    """Two documents in one sequence, masked from each other, against each document alone.

    Returns:
        Largest differences of logits ``masked`` and ``unmasked`` (the control), and the largest ``logit``.
    """
    import torch

    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model

    ctx = initialize(ParallelConfig(), seed=3, standalone=True)
    fields = {**scale.model, "init_method_std": scale.model["hidden_size"] ** -0.5}
    length = int(fields["seq_length"])
    first = length // 2 + 16  # both lengths are multiples of 16
    config = ModelConfig.model_validate(fields)
    chunk = build_model(
        config,
        PrecisionConfig.model_validate({"recipe": recipe}),
        ctx,
        scale.vocab_size,
        parallel=ParallelConfig(),
        wrap_with_ddp=False,
        documents_masked=True,
    )[0].eval()
    tokens = torch.randint(0, scale.vocab_size, (1, length), generator=torch.Generator().manual_seed(5))
    tokens = tokens.to(ctx.device)

    def logits(part: torch.Tensor, masked_from: int | None) -> torch.Tensor:
        size = part.size(1)
        allowed = torch.ones(size, size, device=ctx.device).tril()
        if masked_from is not None:
            allowed[masked_from:, :masked_from] = 0
        positions = torch.arange(size, device=ctx.device)[None]
        return chunk(part, positions, allowed[None, None] < 0.5)[..., : scale.vocab_size].float()

    with torch.no_grad():
        alone = torch.cat((logits(tokens[:, :first], None), logits(tokens[:, first:], None)), dim=1)
        return {
            "masked": (logits(tokens, first) - alone).abs().max().item(),
            "unmasked": (logits(tokens, None) - alone).abs().max().item(),
            "logit": alone.abs().max().item(),
        }


def train_at_edges(folder: Path, scale: Scale, *, recipe: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Two steps of a small model at each of some sizes.

    Args:
        folder: the work folder.
        scale: sizes.
        recipe: precision recipe.
        cases: ``name``, ``model`` (changed fields), ``micro_batch_size``, ``vocab_size``.

    Returns:
        Name of the case -> its losses, or what went wrong.
    """
    from megatron_tokedit.engine.initialize import initialize

    ctx = initialize(ParallelConfig(), seed=1, standalone=True)
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[case["name"]] = _two_steps(ctx, recipe, case)
        except Exception as error:  # noqa: BLE001 - a failing size is the result that is looked for
            results[case["name"]] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    return {"cases": results}


def _two_steps(ctx: Any, recipe: str, case: dict[str, Any]) -> list[float]:
    from megatron_tokedit.engine.model import build_model
    from megatron_tokedit.engine.optimizer import build_optimizer, build_scheduler
    from megatron_tokedit.engine.step import train_step
    from megatron_tokedit.testing.models import random_batches

    model = ModelConfig.model_validate(case["model"])
    precision, parallel = PrecisionConfig.model_validate({"recipe": recipe}), ParallelConfig()
    settings = OptimizerConfig(lr=1e-3)
    vocab_size, rows = case["vocab_size"], case["micro_batch_size"]
    chunks = build_model(model, precision, ctx, vocab_size, parallel=parallel, wrap_with_ddp=True)
    for chunk in chunks:
        chunk.train()
    optimizer = build_optimizer(settings, precision, parallel, chunks, ctx)
    scheduler = build_scheduler(settings, ScheduleConfig(), optimizer, train_steps=10)
    batches = random_batches(
        vocab_size, num_microbatches=1, micro_batch_size=rows, seq_length=model.seq_length
    )
    sizes = {"num_microbatches": 1, "micro_batch_size": rows, "seq_length": model.seq_length}
    return [train_step(chunks, optimizer, scheduler, batches, ctx, **sizes).loss for _ in range(2)]
