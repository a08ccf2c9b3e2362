"""Checks of a precision recipe against sizes, layout and batches; no machine is asked.

Transformer Engine finds out in the first step, as an assertion about some tensor, that a size does not suit
an FP8 product; megatron-core finds out about settings that exclude each other once the ranks have started.
Invariant: what passes here, on a machine that ``engine/preflight.py`` finds sound, is taken by both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_tokedit.config.arithmetic import near_multiples
from megatron_tokedit.config.data import DataConfig
from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.model import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.training import RuntimeConfig, TrainingConfig


def _linear_sizes(model: ModelConfig, tensor_parallel: int) -> Iterator[tuple[str, str, int, int]]:
    """(field, what it is, arithmetic, size over all ranks, ranks) of every size of a layer's products."""
    heads, groups, channels = model.num_attention_heads, model.num_key_value_heads, model.head_size
    yield "hidden_size", "", model.hidden_size, 1
    yield (
        "num_attention_heads",
        f"num_attention_heads x kv_channels = {heads} x {channels}",
        heads * channels,
        tensor_parallel,
    )
    yield (
        "num_query_groups",
        f"(num_attention_heads + 2 x num_query_groups) x kv_channels = ({heads} + 2 x {groups}) x {channels}",
        (heads + 2 * groups) * channels,
        tensor_parallel,
    )
    yield "ffn_hidden_size", "", model.ffn_size, tensor_parallel


def _sizes(model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig) -> Iterator[Fault]:
    """Inputs and outputs of every linear layer on one rank; embedding and output layer are not in FP8."""
    traits = precision.traits
    unit = traits.size_multiple
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1:
        gathered = max(unit, traits.gather_multiple)
    else:
        gathered = unit
    for field, arithmetic, size, ranks in _linear_sizes(model, parallel.tensor_model_parallel_size):
        needed = gathered if field == "hidden_size" else unit
        if size % ranks or size // ranks % needed == 0:  # where ranks do not divide it, _tensor_parallel says
            continue
        shown = f"{arithmetic} = {size}" if arithmetic else f"{size}"
        if ranks > 1:
            shown += f" over tensor_model_parallel_size = {ranks} ranks is {size // ranks}, which"
        yield Fault(
            ("model", field),
            f"{shown} is no multiple of {needed}, as {precision.recipe} needs of both sizes of a matrix; "
            f"for the size {near_multiples(size, needed * ranks)}",
        )


def _tokens(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, training: TrainingConfig
) -> Iterator[Fault]:
    """Tokens of one product: a microbatch, cut by context parallelism; and of what a rank quantizes before it
    is gathered under sequence parallelism.
    """
    traits, context = precision.traits, parallel.context_parallel_size
    tokens = model.seq_length * training.micro_batch_size
    pieces = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    if tokens % (context * pieces):  # _sequence_split says it
        return
    arithmetic = f"seq_length x training.micro_batch_size = {model.seq_length} x {training.micro_batch_size}"
    if context > 1:
        arithmetic += f" / context_parallel_size = {context}"
    demands = [(tokens // context, traits.train_token_multiple, arithmetic, context)]
    if pieces > 1:
        arithmetic += f" / tensor_model_parallel_size = {pieces} (sequence_parallel)"
        unit = max(traits.token_multiple, traits.gather_multiple)
        demands.append((tokens // context // pieces, unit, arithmetic, context * pieces))
    for count, unit, shown, ranks in demands:
        if count % unit:
            yield Fault(
                ("model", "seq_length"),
                f"{shown} makes {count} tokens a product, no multiple of {unit} as {precision.recipe} needs; "
                f"for seq_length x micro_batch_size {near_multiples(tokens, unit * ranks)}",
            )
            return


def _layers_in_bf16(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> Iterator[Fault]:
    """First and last layers that stay in bfloat16: where the recipe has them, and no more than a stage."""
    first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    stages = parallel.pipeline_model_parallel_size
    for field, count in (("num_layers_at_start_in_bf16", first), ("num_layers_at_end_in_bf16", last)):
        path = ("precision", field)
        if not count:
            continue
        if not precision.is_fp8:
            yield Fault(path, f"{count} has no effect under recipe {precision.recipe}; remove it")
        elif not precision.traits.layers_in_bf16:
            able = ", ".join(recipe.name for recipe in RECIPES.values() if recipe.layers_in_bf16)
            yield Fault(
                path,
                f"{count}: {precision.recipe} scales all layers together and cannot leave some in bfloat16; "
                f"set it to 0, or use one of {able}",
            )
        elif model.num_layers % stages == 0 and count > model.num_layers // stages:
            yield Fault(
                path,
                f"{count} is more than the {model.num_layers // stages} layers of a stage (model.num_layers "
                f"= {model.num_layers} / {stages})",
            )
    if precision.traits.layers_in_bf16 and max(first, last) < model.num_layers <= first + last:
        yield Fault(
            ("precision", "num_layers_at_start_in_bf16"),
            f"{first} first and {last} last layers are all of model.num_layers = {model.num_layers}: no "
            f"layer would be in FP8; use recipe bf16",
        )


def _parameters(parallel: ParallelConfig, precision: PrecisionConfig) -> Iterator[Fault]:
    """Parameters kept in FP8 need the distributed optimizer, which holds the exact ones."""
    path = ("precision", "fp8_param_gather")
    if not precision.fp8_param_gather:
        return
    if not precision.is_fp8:
        yield Fault(path, f"true has no effect under recipe {precision.recipe}; remove it")
    elif precision.traits.param_gather is None:
        yield Fault(
            path,
            f"true: parameters are not kept in the format of {precision.recipe} here (megatron-core gathers "
            f"them in bfloat16 through the gradients' memory); set it to false",
        )
    elif not parallel.use_distributed_optimizer:
        yield Fault(path, "parameters are gathered only under parallel.use_distributed_optimizer: true")


def _amax_history(precision: PrecisionConfig) -> Iterator[Fault]:
    if precision.traits.has_amax_history:
        return
    for field in ("fp8_amax_history_len", "fp8_amax_compute_algo"):
        if (value := getattr(precision, field)) is not None:
            yield Fault(
                ("precision", field),
                f"{value}: recipe {precision.recipe} keeps no history of largest values; remove it",
            )


def _recomputed_norms(parallel: ParallelConfig, precision: PrecisionConfig) -> Iterator[Fault]:
    if precision.traits.has_amax_history and "layernorm" in (parallel.recompute_modules or ()):
        yield Fault(
            ("parallel", "recompute_modules"),
            f"layernorm cannot be recomputed under {precision.recipe}: its scales would be counted twice; "
            f"remove it, or use fp8_tensorwise",
        )


def _fused_loss(precision: PrecisionConfig) -> Iterator[Fault]:
    if precision.cross_entropy_loss_fusion is False and precision.cross_entropy_fusion_impl is not None:
        yield Fault(
            ("precision", "cross_entropy_fusion_impl"),
            f"{precision.cross_entropy_fusion_impl} has no effect with cross_entropy_loss_fusion: false",
        )


def _device(precision: PrecisionConfig, runtime: RuntimeConfig) -> Iterator[Fault]:
    """What exists on GPUs only."""
    if runtime.device != "cpu":
        return
    wishes: dict[str, object] = {
        "recipe": precision.recipe if precision.is_fp8 else None,
        "cross_entropy_loss_fusion": "true" if precision.cross_entropy_loss_fusion else None,
        "cross_entropy_fusion_impl": precision.cross_entropy_fusion_impl,
        "cuda_graph_impl": precision.cuda_graph_impl if precision.cuda_graph_impl != "none" else None,
    }
    for field, value in wishes.items():
        if value is not None:
            instead = "use bf16" if field == "recipe" else "remove it"
            yield Fault(("precision", field), f"{value} needs a GPU, and runtime.device is cpu; {instead}")


def _communication_overlap(parallel: ParallelConfig, precision: PrecisionConfig) -> Iterator[Fault]:
    """Transformer Engine's user buffers."""
    path = ("parallel", "tp_comm_overlap")
    if not parallel.tp_comm_overlap:
        return
    if not (parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1):
        yield Fault(
            path,
            "true needs sequence_parallel: true and tensor_model_parallel_size of at least 2: what it hides "
            "is their communication",
        )
    if precision.compute_dtype != "bf16":
        yield Fault(path, f"true has no buffers for recipe {precision.recipe}; use bf16 or an FP8 recipe")
    elif precision.traits.gather_multiple > 1:
        yield Fault(
            path, f"true: Transformer Engine's user buffers do not hold {precision.recipe}; remove it"
        )


def _cuda_graphs(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    training: TrainingConfig,
    data: DataConfig,
) -> Iterator[Fault]:
    """A graph replays the same kernels on the same memory: nothing that changes from step to step fits in."""
    impl, scope = precision.cuda_graph_impl, precision.cuda_graph_scope
    if impl == "none":
        if scope is not None:
            yield Fault(("precision", "cuda_graph_scope"), "has no effect under cuda_graph_impl: none")
        return
    path = ("precision", "cuda_graph_impl")
    if training.rampup_batch_size is not None:
        yield Fault(path, f"{impl} graphs hold as many microbatches as the first step has; remove "
                    f"training.rampup_batch_size, or the graphs")  # fmt: skip
    if data.reset_attention_mask:
        yield Fault(
            path, f"{impl} graphs do not take data.reset_attention_mask's masks; remove one of the two"
        )
    if parallel.recompute_granularity == "full":
        yield Fault(path, f"{impl} graphs cannot hold layers under parallel.recompute_granularity: full")
    if impl == "transformer_engine" and precision.compute_dtype != "bf16":
        yield Fault(
            path, f"{impl} graphs take bfloat16 layers only, not recipe {precision.recipe}; use local"
        )
    if impl == "local" and (model.attention_dropout or model.hidden_dropout):
        yield Fault(
            path, "local graphs would keep dropout in validation; use transformer_engine, or no dropout"
        )
    in_attention = scope is None or "attn" in scope
    if model.attention_dropout and in_attention and "core_attn" in (parallel.recompute_modules or ()):
        yield Fault(
            path, "a recomputed core_attn with model.attention_dropout does not fit into a graph; drop one"
        )
    recomputed = parallel.recompute_modules or ()
    if model.hidden_dropout and (scope is None or "mlp" in scope) and {"mlp", "moe"} & set(recomputed):
        yield Fault(path, "a recomputed mlp with model.hidden_dropout does not fit into a graph; drop one")
    if impl == "transformer_engine" and "moe" in recomputed and "moe_router" in (scope or ()):
        yield Fault(path, f"{impl} graphs of the moe_router do not go with a recomputed moe; drop one")
    if model.family_traits.has_experts:
        if scope is None or "mlp" in scope:
            yield Fault(
                ("precision", "cuda_graph_scope"),
                "experts get other numbers of tokens in every step and do not fit into a graph; set it to "
                "[attn] or [attn, moe_router]",
            )
    elif scope is not None and "moe_router" in scope:
        yield Fault(("precision", "cuda_graph_scope"), f"a layer of family {model.family} has no moe_router")


CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _sizes,
    _tokens,
    _layers_in_bf16,
    _parameters,
    _amax_history,
    _recomputed_norms,
    _fused_loss,
    _device,
    _communication_overlap,
    _cuda_graphs,
)
