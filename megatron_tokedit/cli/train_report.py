"""What ``tools/train.py --dry-run`` and ``--progress`` print.

Invariant: needs no GPU and no process group, changes nothing on disk, and goes on past a problem to find the
next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_tokedit.config.raw_sources import preprocessing_of
from megatron_tokedit.config.record import resolve, to_yaml
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.config.validate import num_microbatches
from megatron_tokedit.dataset.sources import missing_sources
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import TokeditError
from megatron_tokedit.pipeline.plan import load_plan
from megatron_tokedit.pipeline.workdir import WorkDir

GIB = 1024**3


def print_progress(config: RunConfig) -> int:
    """Print how far the run is on one line, without torch; returns the exit code.

    The newest complete checkpoint's step and, while sources have yet to be made, their finished work units.
    """
    latest = checkpoint_folder.find_latest(Path(config.run_dir) / "checkpoints")
    step = checkpoint_folder.read_json(latest, checkpoint_folder.STATE_FILE)["step"] if latest else 0
    parts = [f"{config.run_dir}: step {step} of {config.training.train_steps}", *_preparation(config)]
    print("; ".join(parts))
    return 0


def _preparation(config: RunConfig) -> Iterator[str]:
    """``preparing NAME: 3 of 11 units`` for every source that has to be made first."""
    for source in missing_sources(config):
        workdir = WorkDir(preprocessing_of(source, config.tokenizer).output_prefix)
        plan = load_plan(workdir.plan)
        if plan is None:
            yield f"preparing {source.name}: not begun"
        else:
            done = sum(workdir.unit_marker(unit.unit_id).exists() for unit in plan.units)
            yield f"preparing {source.name}: {done} of {len(plan.units)} units"


def print_report(config: RunConfig, world_size: int | None) -> int:
    """Print everything that is known before a run starts.

    Args:
        config: sound.
        world_size: number of ranks; None: as few as the model needs, said so.

    Returns:
        0, or 1 if a problem was found.
    """
    problems: list[str] = []
    parallel = config.parallel
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    assumed = " (assumed: one copy of the model; give --world-size)" if world_size is None else ""
    ranks = world_size or model_ranks
    spec = _tokenizer(config, problems)
    vocab_size = spec["vocab_size"] if spec else config.model.vocab_size
    if vocab_size is not None:
        config = resolve(config, vocab_size=vocab_size)
    print("# resolved configuration")
    print(to_yaml(config))
    print(f"# sizes on {ranks} rank(s){assumed}")
    for line in _sizes(config, ranks // model_ranks, vocab_size):
        print(line)
    print("\n# data")
    for line in _data(config, spec, problems):
        print(line)
    if problems:
        print(f"\n# {len(problems)} problem(s)")
        for problem in problems:
            print(f"- {problem}")
        return 1
    print("\nno problems found")
    return 0


def _tokenizer(config: RunConfig, problems: list[str]) -> dict[str, Any] | None:
    from megatron_tokedit.tokenizers import load_tokenizer, tokenizer_spec

    try:
        spec = tokenizer_spec(load_tokenizer(config.tokenizer.type, config.tokenizer.model))
    except TokeditError as error:
        problems.append(f"tokenizer: {error}")
        return None
    vocab_size = config.model.vocab_size
    if vocab_size is not None and vocab_size < spec["vocab_size"]:
        problems.append(
            f"model.vocab_size: {vocab_size} ids cannot hold the tokenizer's {spec['vocab_size']}"
        )
    return spec


def _sizes(config: RunConfig, data_parallel: int, vocab_size: int | None) -> Iterator[str]:
    """Batch arithmetic, parameters and memory."""
    from megatron_tokedit.engine.model import flops_per_token, num_parameters
    from megatron_tokedit.training.estimate import estimate_memory

    training, model, parallel = config.training, config.model, config.parallel
    tokens = training.global_batch_size * model.seq_length
    yield (
        f"layout: tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x data {data_parallel}"
    )
    yield (
        f"batch: {training.global_batch_size} sequences a step = {training.micro_batch_size} a microbatch x "
        f"{num_microbatches(training, data_parallel)} microbatches x {data_parallel} data-parallel rank(s); "
        f"{tokens:,} tokens a step, {tokens * training.train_steps:,} in {training.train_steps:,} steps"
    )
    if vocab_size is None:
        yield "parameters: not known without the vocabulary size"
        return
    flops = flops_per_token(model, vocab_size)
    yield f"parameters: {num_parameters(model, vocab_size):,}"
    run_flops = flops * tokens * training.train_steps
    yield f"compute: {flops / 1e9:.4g} GFLOP a token, {run_flops / 1e15:.4g} PFLOP in all"
    memory = estimate_memory(config, data_parallel_size=data_parallel)
    parts = ("parameters", "gradients", "optimizer", "activations", "logits")
    shown = " + ".join(f"{part} {getattr(memory, part) / GIB:.3g}" for part in parts)
    yield f"memory a rank (estimate): {memory.total / GIB:.3g} GiB = {shown}"


def _data(config: RunConfig, spec: Mapping[str, Any] | None, problems: list[str]) -> Iterator[str]:
    """The table of sources, and what has to be made first."""
    from megatron_tokedit.cli.train_sources import outdated_sources
    from megatron_tokedit.config.raw_sources import preprocessing_of
    from megatron_tokedit.corpus import expand_inputs
    from megatron_tokedit.dataset.sources import format_shares, inspect_sources, source_shares

    for source in missing_sources(config):
        yield f"to be made first: {source.prefix} from {', '.join(source.input or [])}"
        try:
            expand_inputs(source.input or [])
            job = preprocessing_of(source, config.tokenizer)
            if job.edits and job.prior is not None:
                from megatron_tokedit.scoring.load import identify_prior  # imports torch

                identify_prior(job.prior, job.prior_backend)
        except TokeditError as error:
            problems.append(f"source {source.name}: {error}")
    problems += outdated_sources(config)
    if spec is None:
        yield "the sources cannot be checked without the tokenizer"
        return
    try:
        infos = inspect_sources(
            config.data, tokenizer_spec=spec, seq_length=config.model.seq_length, require_all=False
        )
    except TokeditError as error:
        problems.append(str(error))
        return
    num_samples = config.training.train_steps * config.training.global_batch_size
    shares = source_shares(
        config.data, infos, num_train_samples=num_samples, seq_length=config.model.seq_length
    )
    if shares:
        yield from format_shares(shares)
