"""Checks of model, layout and batches against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_tokedit.config.arithmetic import divisors, near_multiples
from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.model import ModelConfig, ParallelConfig
from megatron_tokedit.config.training import TrainingConfig


def _head_sizes(model: ModelConfig) -> Iterator[Fault]:
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if model.kv_channels is None and model.hidden_size % heads:
        yield Fault(
            ("model", "hidden_size"),
            f"{model.hidden_size} is not a multiple of num_attention_heads = {heads}; set kv_channels, or "
            f"{near_multiples(model.hidden_size, heads)}",
        )
    if heads % groups:
        yield Fault(
            ("model", "num_query_groups"),
            f"{groups} does not divide num_attention_heads = {heads}; {divisors(heads)}",
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
                f"{size} / {tensor_parallel} = {size / tensor_parallel:.4g}; {divisors(size)}",
            )


def _pipeline_parallel(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    stages = parallel.pipeline_model_parallel_size
    if model.num_layers % stages:
        yield Fault(
            ("parallel", "pipeline_model_parallel_size"),
            f"{stages} does not divide model.num_layers = {model.num_layers}; {divisors(model.num_layers)}",
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
            f"{near_multiples(batch, unit)}",
        )


def _batches(training: TrainingConfig) -> Iterator[Fault]:
    batch, micro = training.global_batch_size, training.micro_batch_size
    if batch % micro:
        yield Fault(
            ("training", "global_batch_size"),
            f"{batch} is not a multiple of micro_batch_size = {micro}; {near_multiples(batch, micro)}",
        )


CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _head_sizes,
    _positions,
    _tensor_parallel,
    _pipeline_parallel,
    _world,
    _batches,
)
