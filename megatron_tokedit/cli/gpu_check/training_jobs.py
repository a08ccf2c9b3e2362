"""Training runs, whole or resumed, through the trainer that ``tools/train.py`` uses."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tokedit.cli.gpu_check.data_jobs import DATASET, TOKENIZER
from megatron_tokedit.cli.gpu_check.sizes import Scale
from megatron_tokedit.config.load import config_from_mapping
from megatron_tokedit.config.sections import RunConfig


def run_folder(folder: Path, run: str) -> Path:
    """Where a run of this name is."""
    return folder / "runs" / run


def run_config(folder: Path, scale: Scale, run: str, recipe: str, **changes: Any) -> RunConfig:
    """The configuration of a run.

    Args:
        folder: the work folder, with the dataset in it.
        scale: sizes.
        run: name of the run.
        recipe: precision recipe.
        changes: ``save_interval_steps`` and ``exit_at_step``.
    """
    sections = {
        "run_dir": str(run_folder(folder, run)),
        "seed": 1234,
        "tokenizer": {"type": "SentencePieceTokenizer", "model": str(folder / TOKENIZER)},
        "model": scale.model,
        "precision": {"recipe": recipe},
        "optimizer": {"lr": scale.learning_rate, "min_lr": scale.learning_rate / 10},
        "schedule": {"lr_warmup_steps": scale.first_steps // 2},
        "training": {
            "train_steps": scale.train_steps,
            "micro_batch_size": scale.micro_batch_size,
            "global_batch_size": scale.global_batch_size,
        },
        "data": {
            "train": [{"name": "text", "prefix": str(folder / DATASET)}],
            "cache_dir": str(folder / "index_cache"),
        },
        "checkpoint": {"save_interval_steps": changes.get("save_interval_steps", scale.save_step)},
        "logging": {"log_interval_steps": scale.train_steps},
        "runtime": {"exit_at_step": changes.get("exit_at_step")},
    }
    return config_from_mapping(sections, origin="gpu_check")


def train(
    folder: Path,
    scale: Scale,
    *,
    run: str,
    recipe: str,
    start: str | None = None,
    start_step: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Train.

    Args:
        folder: the work folder.
        scale: sizes.
        run: name of the run.
        recipe: precision recipe.
        start: another run that this one goes on from, if any.
        start_step: the step it goes on after.
        changes: as of :func:`run_config`.

    Returns:
        ``losses`` and ``grad_norms`` (a list, by step from ``first_step`` on), ``skipped_steps``, the
        evidence of FP8 and what speaks against it, ``peak_memory_gib`` and ``device``.
    """
    from megatron_tokedit.config.record import resolve
    from megatron_tokedit.config.validate import validate
    from megatron_tokedit.engine.fp8_evidence import evidence_faults, fp8_evidence
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.scoring.cost import peak_memory_bytes
    from megatron_tokedit.tokenizers import load_tokenizer, tokenizer_spec
    from megatron_tokedit.training.metrics import read_metrics
    from megatron_tokedit.training.trainer import Trainer

    shutil.rmtree(run_folder(folder, run), ignore_errors=True)
    if start is not None:
        _take_checkpoint(run_folder(folder, start), run_folder(folder, run), start_step)
    config = run_config(folder, scale, run, recipe, **changes)
    spec = tokenizer_spec(load_tokenizer(config.tokenizer.type, config.tokenizer.model))
    config = resolve(config, vocab_size=spec["vocab_size"])
    validate(config, world_size=1)
    ctx = initialize(config.parallel, seed=config.seed, standalone=True)
    trainer = Trainer(config, ctx, spec, progress=None)
    result = trainer.run()
    records = read_metrics(Path(config.run_dir), "train")
    evidence = fp8_evidence(trainer.model)
    if start is not None:
        shutil.rmtree(config.run_dir)  # nobody goes on from it
    return {
        "first_step": records[0]["step"],
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "skipped_steps": result.state.skipped_steps,
        "evidence": asdict(evidence),
        "faults": evidence_faults(evidence, config.precision, config.parallel),
        "peak_memory_gib": round(peak_memory_bytes(ctx.device) / 2**30, 2),
        "device": ctx.device.type,
    }


def _take_checkpoint(source: Path, target: Path, step: int) -> None:
    """Give a run the checkpoint of another, and nothing else of it."""
    from megatron_tokedit.engine.checkpoint_folder import step_folder

    found = step_folder(source / "checkpoints", step)
    shutil.copytree(found, step_folder(target / "checkpoints", step))
