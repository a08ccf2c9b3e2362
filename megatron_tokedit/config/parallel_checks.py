"""Checks of a layout: its settings against each other and against the model's sizes.

Invariant: what passes here, and has a world size that fits, is accepted by megatron-core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from megatron_tokedit.config.arithmetic import divisors, near_multiples
from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.model import ModelConfig, ParallelConfig


def model_ranks(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of the model."""
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def smallest_world(parallel: ParallelConfig) -> int:
    """Fewest ranks the layout can run on: one copy of the model, or as many as share its experts."""
    context, experts = parallel.context_parallel_size, parallel.expert_model_parallel_size
    return model_ranks(parallel) * (experts // math.gcd(experts, context))


def layout_in_words(parallel: ParallelConfig, data_parallel_size: int) -> str:
    """``tensor 2 x pipeline 1 x data 4``, and what else is set."""
    more = [
        f"{words} {size}"
        for words, size in (
            ("context", parallel.context_parallel_size),
            ("expert", parallel.expert_model_parallel_size),
            ("chunks a stage", parallel.virtual_pipeline_model_parallel_size),
        )
        if size > 1
    ]
    if parallel.sequence_parallel:
        more.append("sequence parallel")
    if parallel.recompute_granularity is not None:
        more.append(f"{parallel.recompute_granularity} recomputation")
    return ", ".join(
        [
            f"tensor {parallel.tensor_model_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x data {data_parallel_size}",
            *more,
        ]
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


def _sequence_split(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    """Sequence and context parallelism cut every sequence; context parallelism twice, to balance the work."""
    context, tensor_parallel = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and tensor_parallel == 1:
        yield Fault(
            ("parallel", "sequence_parallel"),
            "has no effect at tensor_model_parallel_size = 1; remove it, or raise that",
        )
    pieces = tensor_parallel if parallel.sequence_parallel else 1
    field, arithmetic = "sequence_parallel", f"tensor_model_parallel_size = {tensor_parallel}"
    if context > 1:
        field, arithmetic = "context_parallel_size", f"2 x context_parallel_size = 2 x {context}"
        if pieces > 1:
            arithmetic += f" times tensor_model_parallel_size = {tensor_parallel}"
        pieces *= 2 * context
    if model.seq_length % pieces:
        yield Fault(
            ("parallel", field),
            f"model.seq_length = {model.seq_length} cannot be cut into {pieces} equal pieces ({arithmetic}): "
            f"{model.seq_length} / {pieces} = {model.seq_length / pieces:.4g}; "
            f"for the length {near_multiples(model.seq_length, pieces)}",
        )


def _pipeline_parallel(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if chunks > 1 and stages == 1:
        yield Fault(
            ("parallel", "virtual_pipeline_model_parallel_size"),
            f"{chunks} chunks a stage need more than one stage; raise pipeline_model_parallel_size",
        )
    elif model.num_layers % stages:
        yield Fault(
            ("parallel", "pipeline_model_parallel_size"),
            f"{stages} does not divide model.num_layers = {model.num_layers}; {divisors(model.num_layers)}",
        )
    elif model.num_layers % (stages * chunks):
        yield Fault(
            ("parallel", "virtual_pipeline_model_parallel_size"),
            f"{chunks} does not divide the {model.num_layers // stages} layers of a stage (model.num_layers "
            f"/ pipeline_model_parallel_size = {model.num_layers} / {stages}); "
            f"{divisors(model.num_layers // stages)}",
        )


def _expert_parallel(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    size, experts = parallel.expert_model_parallel_size, model.num_moe_experts
    if not model.family_traits.has_experts:
        if size > 1:
            yield Fault(
                ("parallel", "expert_model_parallel_size"),
                f"family {model.family} has no experts to spread; set it to 1",
            )
        return
    if experts is not None and experts % size:
        yield Fault(
            ("parallel", "expert_model_parallel_size"),
            f"{size} does not divide model.num_moe_experts = {experts}; {divisors(experts)}",
        )
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield Fault(
            ("parallel", "sequence_parallel"),
            f"experts under tensor_model_parallel_size = {parallel.tensor_model_parallel_size} need it: "
            f"megatron-core trains them only with sequence_parallel: true",
        )


def _optimizer_overlap(parallel: ParallelConfig) -> Iterator[Fault]:
    if not parallel.overlap_param_gather:
        return
    if not parallel.use_distributed_optimizer:
        yield Fault(
            ("parallel", "overlap_param_gather"),
            "parameters are gathered only under use_distributed_optimizer: true",
        )
    if not parallel.overlap_grad_reduce:
        yield Fault(
            ("parallel", "overlap_param_gather"),
            f"needs overlap_grad_reduce: true, which is {str(parallel.overlap_grad_reduce).lower()}",
        )


def _recomputation(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Fault]:
    granularity, layers = parallel.recompute_granularity, parallel.recompute_num_layers
    names = ("recompute_method", "recompute_num_layers", "recompute_modules")
    used = {None: (), "full": names[:2], "selective": names[2:]}[granularity]
    for name in names:
        if getattr(parallel, name) is not None and name not in used:
            yield Fault(
                ("parallel", name), f"has no effect under recompute_granularity: {granularity or 'null'}"
            )
    if granularity == "full":
        for name in names[:2]:
            if getattr(parallel, name) is None:
                example = "uniform" if name == "recompute_method" else "1"
                yield Fault(
                    ("parallel", name), f"recompute_granularity: full needs it, for instance {example}"
                )
        chunks = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
        present = max(1, model.num_layers // chunks)
        if layers is not None and layers > present:
            yield Fault(
                ("parallel", "recompute_num_layers"),
                f"{layers} is more than the {present} layers of a stage (model.num_layers = "
                f"{model.num_layers} / {chunks})",
            )
    modules = parallel.recompute_modules or []
    for module, fits in (
        ("mlp", not model.family_traits.has_experts),
        ("moe", model.family_traits.has_experts),
    ):
        if module in modules and not fits:
            yield Fault(
                ("parallel", "recompute_modules"), f"a layer of family {model.family} has no {module}"
            )
    if "mlp" in modules and model.family_traits.add_bias_linear:
        yield Fault(
            ("parallel", "recompute_modules"),
            f"megatron-core cannot recompute an mlp with biases (family {model.family}): its backward pass "
            f"hangs; use recompute_granularity: full, or core_attn and layernorm",
        )


CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _tensor_parallel,
    _sequence_split,
    _pipeline_parallel,
    _expert_parallel,
    _optimizer_overlap,
    _recomputation,
)
