"""Checks of model, layout and batches against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_tokedit.config.arithmetic import divisors, near_multiples
from megatron_tokedit.config.data import DataConfig
from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.model import ModelConfig, ParallelConfig
from megatron_tokedit.config.parallel_checks import CHECKS as PARALLEL_CHECKS
from megatron_tokedit.config.parallel_checks import model_ranks
from megatron_tokedit.config.training import RuntimeConfig, TrainingConfig


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
    if model.family_traits.uses_rope and model.head_size % 2:
        yield Fault(
            ("model", "kv_channels"),
            f"a head of {model.head_size} channels is odd, rotary positions need pairs",
        )


def _positions(model: ModelConfig) -> Iterator[Fault]:
    uses_rope = model.family_traits.uses_rope
    if not uses_rope and model.seq_length > model.max_positions:
        yield Fault(
            ("model", "seq_length"),
            f"{model.seq_length} tokens do not fit the {model.max_positions} learned positions of "
            f"max_position_embeddings",
        )
    for field in ("rope_scaling", "seq_len_interpolation_factor"):
        if getattr(model, field) and not uses_rope:
            yield Fault(
                ("model", field), f"family {model.family} has learned positions, not rotary ones; remove it"
            )
    if model.rope_scaling_factor is not None and not model.rope_scaling:
        yield Fault(("model", "rope_scaling_factor"), "has no effect without rope_scaling: true")


_EXPERT_FIELDS = ("num_moe_experts", "moe_router_topk", "moe_aux_loss_coeff", "moe_z_loss_coeff")


def _experts(model: ModelConfig) -> Iterator[Fault]:
    if not model.family_traits.has_experts:
        for field in _EXPERT_FIELDS:
            if getattr(model, field) != ModelConfig.model_fields[field].default:
                yield Fault(
                    ("model", field), f"family {model.family} has no experts; use mixtral, or remove it"
                )
    elif model.num_moe_experts is None:
        yield Fault(("model", "num_moe_experts"), f"family {model.family} needs it, such as 8")
    elif not 2 <= model.moe_router_topk <= model.num_moe_experts:
        yield Fault(
            ("model", "moe_router_topk"),
            f"{model.moe_router_topk} is not between 2 and num_moe_experts = {model.num_moe_experts}",
        )


def _world(parallel: ParallelConfig, training: TrainingConfig, world_size: int) -> Iterator[Fault]:
    sizes = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
    }
    if parallel.context_parallel_size > 1:
        sizes["context_parallel_size"] = parallel.context_parallel_size
    copy_size = model_ranks(parallel)
    if world_size % copy_size:
        yield Fault(
            ("parallel",),
            f"{world_size} ranks cannot be divided into copies of the model of {' x '.join(sizes)} = "
            f"{' x '.join(map(str, sizes.values()))} = {copy_size} ranks each",
        )
        return
    data_parallel = world_size // copy_size
    experts, sharing = parallel.expert_model_parallel_size, data_parallel * parallel.context_parallel_size
    if sharing % experts:
        yield Fault(
            ("parallel", "expert_model_parallel_size"),
            f"{experts} does not divide the {sharing} ranks that would share the experts (data-parallel x "
            f"context-parallel size = {data_parallel} x {parallel.context_parallel_size}, of {world_size} "
            f"ranks); {divisors(sharing)}",
        )
    yield from _batch_over_ranks(parallel, training, data_parallel, f"{world_size} ranks / {copy_size}")


def _batch_over_ranks(
    parallel: ParallelConfig, training: TrainingConfig, data_parallel: int, arithmetic: str
) -> Iterator[Fault]:
    batch, micro = training.global_batch_size, training.micro_batch_size
    unit = micro * data_parallel
    if batch % micro:  # _batches says it
        return
    if batch % unit:
        yield Fault(
            ("training", "global_batch_size"),
            f"{batch} is not a multiple of micro_batch_size x data-parallel size = {micro} x "
            f"{data_parallel} = {unit} (data-parallel size = {arithmetic}); "
            f"{near_multiples(batch, unit)}",
        )
        return
    if parallel.virtual_pipeline_model_parallel_size > 1:
        yield from _interleaved_batches(parallel, training, unit)


def _interleaved_batches(parallel: ParallelConfig, training: TrainingConfig, unit: int) -> Iterator[Fault]:
    """Interleaved stages take microbatches in groups of as many as there are stages, at every batch size."""
    stages = parallel.pipeline_model_parallel_size
    sizes = {"global_batch_size": [training.global_batch_size]}
    if training.rampup_batch_size is not None:
        sizes["rampup_batch_size"] = training.rampup_batch_size[:2]
    for field, batches in sizes.items():
        for batch in batches:
            if batch % unit == 0 and batch // unit % stages:
                yield Fault(
                    ("training", field),
                    f"{batch} makes {batch} / {unit} = {batch // unit} microbatches a rank; interleaved "
                    f"stages need a multiple of pipeline_model_parallel_size = {stages}; "
                    f"{near_multiples(batch, unit * stages)}",
                )


def _batches(training: TrainingConfig) -> Iterator[Fault]:
    batch, micro = training.global_batch_size, training.micro_batch_size
    if batch % micro:
        yield Fault(
            ("training", "global_batch_size"),
            f"{batch} is not a multiple of micro_batch_size = {micro}; {near_multiples(batch, micro)}",
        )


def _context_parallel_device(parallel: ParallelConfig, runtime: RuntimeConfig) -> Iterator[Fault]:
    if parallel.context_parallel_size > 1 and runtime.device == "cpu":
        yield Fault(
            ("parallel", "context_parallel_size"),
            f"{parallel.context_parallel_size} needs Transformer Engine's attention on a GPU, and "
            f"runtime.device is cpu; set it to 1",
        )


def _context_parallel_masks(parallel: ParallelConfig, data: DataConfig) -> Iterator[Fault]:
    if parallel.context_parallel_size > 1 and data.reset_attention_mask:
        yield Fault(
            ("data", "reset_attention_mask"),
            f"an attention mask cannot be split over context_parallel_size = "
            f"{parallel.context_parallel_size} ranks; set one of the two back",
        )


CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _head_sizes,
    _positions,
    _experts,
    *PARALLEL_CHECKS,
    _world,
    _batches,
    _context_parallel_device,
    _context_parallel_masks,
)
