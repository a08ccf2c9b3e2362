"""Checks that involve more than one section, with the arithmetic in the message.

Why: megatron-core finds out about most of these after the cluster has started, one at a time and as an
assertion. Invariant: a check is a generator of faults over the sections it names as parameters, so that it
can run on the sound sections of a configuration while others are still faulty.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_tokedit.config.faults import Fault, KeyPath, raise_faults
from megatron_tokedit.config.raw_sources import json_keys, output_prefix_and_key, preprocessing_of
from megatron_tokedit.config.sections import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron_tokedit.errors import ConfigError


def validate(config: RunConfig, world_size: int | None = None) -> None:
    """Check a configuration across its sections.

    Args:
        config: sound section by section.
        world_size: number of ranks; without it the checks that need it are left out.

    Raises:
        ConfigError: one message with every fault.
    """
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    raise_faults(cross_section_faults(sections, world_size=world_size), "configuration")


def cross_section_faults(sections: Mapping[str, Any], *, world_size: int | None = None) -> list[Fault]:
    """Run every check whose sections (its parameter names) are among ``sections``."""
    known = dict(sections)
    if world_size is not None:
        known["world_size"] = world_size
    faults: list[Fault] = []
    for check in _CHECKS:
        needed = inspect.signature(check).parameters
        if needed.keys() <= known.keys():
            faults += check(**{name: known[name] for name in needed})
    return faults


def num_microbatches(training: TrainingConfig, data_parallel_size: int) -> int:
    """Microbatches a rank runs for one step (gradient accumulation)."""
    return training.global_batch_size // (training.micro_batch_size * data_parallel_size)


def _head_sizes(model: ModelConfig) -> Iterator[Fault]:
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if model.kv_channels is None and model.hidden_size % heads:
        yield Fault(
            ("model", "hidden_size"),
            f"{model.hidden_size} is not a multiple of num_attention_heads = {heads}; set kv_channels, or "
            f"{_near_multiples(model.hidden_size, heads)}",
        )
    if heads % groups:
        yield Fault(
            ("model", "num_query_groups"),
            f"{groups} does not divide num_attention_heads = {heads}; {_divisors(heads)}",
        )
    if model.family == "llama" and model.head_size % 2:
        yield Fault(
            ("model", "kv_channels"),
            f"a head of {model.head_size} channels is odd, rotary positions need pairs",
        )


def _positions(model: ModelConfig) -> Iterator[Fault]:
    if model.family == "gpt2" and model.seq_length > model.max_positions:
        yield Fault(
            ("model", "seq_length"),
            f"{model.seq_length} tokens do not fit the {model.max_positions} learned positions of "
            f"max_position_embeddings",
        )


def _position_resets(model: ModelConfig, data: DataConfig) -> Iterator[Fault]:
    if data.reset_position_ids and not data.reset_attention_mask and model.family == "llama":
        yield Fault(
            ("data", "reset_position_ids"),
            "has no effect on rotary positions, which are relative; remove it, or separate the documents "
            "with reset_attention_mask",
        )


def _tensor_parallel(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    tensor_parallel = parallel.tensor_model_parallel_size
    resolved = model.resolved()
    for field in ("num_attention_heads", "num_query_groups", "hidden_size", "ffn_hidden_size"):
        size = getattr(resolved, field)
        if size % tensor_parallel:
            default = " (its default)" if getattr(model, field) is None else ""
            yield Fault(
                ("parallel", "tensor_model_parallel_size"),
                f"{tensor_parallel} does not divide model.{field} = {size}{default}: "
                f"{size} / {tensor_parallel} = {size / tensor_parallel:.4g}; {_divisors(size)}",
            )


def _pipeline_parallel(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    stages = parallel.pipeline_model_parallel_size
    if model.num_layers % stages:
        yield Fault(
            ("parallel", "pipeline_model_parallel_size"),
            f"{stages} does not divide model.num_layers = {model.num_layers}; {_divisors(model.num_layers)}",
        )


def _world(parallel: ParallelConfig, training: TrainingConfig, world_size: int) -> Iterator[Fault]:
    tensor_parallel, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    model_ranks = tensor_parallel * stages
    if world_size % model_ranks:
        yield Fault(
            ("parallel",),
            f"{world_size} ranks cannot be divided into copies of the model of tensor_model_parallel_size x "
            f"pipeline_model_parallel_size = {tensor_parallel} x {stages} = {model_ranks} ranks each",
        )
        return
    data_parallel = world_size // model_ranks
    batch, micro = training.global_batch_size, training.micro_batch_size
    unit = micro * data_parallel
    if batch % unit and not batch % micro:  # else _batches says it
        yield Fault(
            ("training", "global_batch_size"),
            f"{batch} is not a multiple of micro_batch_size x data-parallel size = {micro} x "
            f"{data_parallel} = {unit} (data-parallel size = {world_size} ranks / {model_ranks}); "
            f"{_near_multiples(batch, unit)}",
        )


def _batches(training: TrainingConfig) -> Iterator[Fault]:
    batch, micro = training.global_batch_size, training.micro_batch_size
    if batch % micro:
        yield Fault(
            ("training", "global_batch_size"),
            f"{batch} is not a multiple of micro_batch_size = {micro}; {_near_multiples(batch, micro)}",
        )


def _schedule(schedule: ScheduleConfig, training: TrainingConfig) -> Iterator[Fault]:
    decay_steps = schedule.lr_decay_steps or training.train_steps
    if schedule.lr_warmup_steps >= decay_steps:
        default = "" if schedule.lr_decay_steps else " (training.train_steps)"
        yield Fault(
            ("schedule", "lr_warmup_steps"),
            f"{schedule.lr_warmup_steps} must be smaller than lr_decay_steps = {decay_steps}{default}",
        )


def _learning_rates(optimizer: OptimizerConfig) -> Iterator[Fault]:
    if optimizer.min_lr > optimizer.lr:
        yield Fault(("optimizer", "min_lr"), f"{optimizer.min_lr} is larger than lr = {optimizer.lr}")


def _checkpoints(checkpoint: CheckpointConfig) -> Iterator[Fault]:
    if checkpoint.keep_last and not checkpoint.save_interval_steps:
        yield Fault(
            ("checkpoint", "keep_last"),
            f"{checkpoint.keep_last} has nothing to choose from: save_interval_steps is 0",
        )


def _sources(data: DataConfig) -> Iterator[Fault]:
    for split, sources in (("train", data.train), ("validation", data.validation)):
        first_index: dict[str, int] = {}
        for index, source in enumerate(sources):
            path = ("data", split, index)
            first = first_index.setdefault(source.name, index)
            if first != index:
                yield Fault((*path, "name"), f"{source.name!r} is also the name of data.{split}.{first}")
            yield from _prefix(path, source)


def _prefix(path: KeyPath, source: SourceConfig) -> Iterator[Fault]:
    for suffix in (".bin", ".idx"):
        if source.prefix.endswith(suffix):
            yield Fault(
                (*path, "prefix"),
                f"got {source.prefix!r}, expected {source.prefix.removesuffix(suffix)!r} (without {suffix})",
            )
    if source.input is not None and output_prefix_and_key(source) is None:
        key = json_keys(source)[0]
        yield Fault(
            (*path, "prefix"),
            f"got {source.prefix!r}, expected a name that ends in _{key}_document, because the dataset is "
            f"made from `input` under its JSON key: {source.prefix}_{key}_document",
        )


def _edits(data: DataConfig, tokenizer: TokenizerConfig) -> Iterator[Fault]:
    for split, sources in (("train", data.train), ("validation", data.validation)):
        for index, source in enumerate(sources):
            path = ("data", split, index, "edit")
            if source.input is not None:
                try:
                    preprocessing_of(source, tokenizer)
                except ConfigError as error:
                    yield Fault(path, str(error))
            elif source.edit is not None:
                yield Fault(path, "there is nothing to edit: `input` (raw text files) is not given")


def _near_multiples(value: int, unit: int) -> str:
    """``try 24 or 32``: the multiples of ``unit`` around ``value``."""
    lower = value // unit * unit
    return f"try {lower} or {lower + unit}" if lower else f"try {unit}"


def _divisors(value: int) -> str:
    """``sizes that do: 1, 2, 4``, at most the first eight."""
    divisors = [size for size in range(1, min(value, 128) + 1) if value % size == 0][:8]
    return f"sizes that do: {', '.join(map(str, divisors))}"


_CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _head_sizes,
    _positions,
    _position_resets,
    _tensor_parallel,
    _pipeline_parallel,
    _world,
    _batches,
    _schedule,
    _learning_rates,
    _checkpoints,
    _sources,
    _edits,
)
