"""Which kernel every part of a training run will use on a machine, and why.

What ``layers``, ``model``, ``precision`` and megatron-core decide when a model is built, said beforehand.
Invariant: pure; nothing is imported or built, so that another machine than this one can be asked about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.engine import preflight
from megatron_tokedit.engine.machine import Probe

MAX_BLOCKED_POSITIONS = 1024
"""As in ``cpu_kernels``, which a test compares it with: importing that is for ranks."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a run.

    Attributes:
        name: what it does.
        kernel: what it is done with.
        reason: why that.
    """

    name: str
    kernel: str
    reason: str


def training_parts(
    found: Probe,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    model: ModelConfig | None = None,
) -> list[Part]:
    """The parts of a training run, in the order of a step.

    Args:
        found: the machine.
        precision: the recipe and what goes with it.
        parallel: the layout.
        model: the model, where known.
    """
    if not found.has_cuda:
        parts = [*_cpu_layers(model), *_cpu_step(precision)]
    else:
        parts = [*_gpu_layers(found, precision, model), *_gpu_step(found, precision, parallel)]
    return [*parts, _graphs(precision), _collectives(found, parallel)]


def _engine_reason(found: Probe) -> str:
    return f"Transformer Engine {found.transformer_engine} is installed"


def _has_rope(model: ModelConfig | None) -> bool:
    return model is None or model.family_traits.uses_rope


def _cpu_layers(model: ModelConfig | None) -> Iterator[Part]:
    why = "no CUDA device"
    yield Part("linear layers", "megatron-core's, torch matrix products", why)
    blocked = f"our blocked kernel up to {MAX_BLOCKED_POSITIONS} positions, else torch's attention"
    if model is not None and model.seq_length > MAX_BLOCKED_POSITIONS:
        blocked = "torch's scaled_dot_product_attention"
    yield Part("attention", blocked, f"{why}; torch's also under masks and dropout")
    if _has_rope(model):
        yield Part("rotary positions", "torch", why)
    yield Part("norms", "torch", why)
    if model is None or model.family_traits.has_experts:
        yield Part("experts", "one after another, allgather", why)


def _cpu_step(precision: PrecisionConfig) -> Iterator[Part]:
    yield Part("loss", "our blocked cross entropy, in parts of the vocabulary", "no CUDA device")
    yield Part("weight gradients", "added to float32 buffers after each product", "no CUDA device")
    yield Part("optimizer", "torch's fused AdamW", "no CUDA device")


def _gpu_layers(found: Probe, precision: PrecisionConfig, model: ModelConfig | None) -> Iterator[Part]:
    has_experts = model is not None and model.family_traits.has_experts
    if found.transformer_engine is None:
        why = f"Transformer Engine: {preflight.engine_fault(found)}"
        yield Part(
            "linear layers", "megatron-core's, torch matrix products in " + precision.compute_dtype, why
        )
        yield Part("attention", "torch's scaled_dot_product_attention", why)
        if _has_rope(model):
            yield Part("rotary positions", "torch", why)
        yield Part("norms", "torch", why)
        if model is None or has_experts:
            yield Part("experts", "one after another, alltoall", why)
        return
    why = _engine_reason(found)
    yield Part("linear layers", f"Transformer Engine's, {precision.traits.description}", why)
    flash = f"flash-attn {found.flash_attn}, or cuDNN's" if found.flash_attn else "cuDNN's fused attention"
    yield Part("attention", f"Transformer Engine's, which picks {flash} by shape and mask", why)
    if _has_rope(model):
        yield Part("rotary positions", "Transformer Engine's, fused", why)
    fused = model is None or model.family_traits.norm_has_weights
    kernel = "Transformer Engine's, in one layer with the product behind it" if fused else "torch"
    yield Part("norms", kernel, why if fused else "norms without weights are not Transformer Engine's")
    if model is None or has_experts:
        yield Part("experts", "Transformer Engine's grouped products, alltoall", why)


def _gpu_step(found: Probe, precision: PrecisionConfig, parallel: ParallelConfig) -> Iterator[Part]:
    has_engine = found.transformer_engine is not None
    wanted = precision.cross_entropy_loss_fusion
    if has_engine if wanted is None else wanted:
        te = (precision.cross_entropy_fusion_impl or ("te" if has_engine else "native")) == "te"
        loss = (
            "Transformer Engine's, in place in the logits' precision" if te else "megatron-core's, compiled"
        )
        yield Part("loss", loss, _engine_reason(found) if te else "precision.cross_entropy_fusion_impl")
    else:
        why = "no Transformer Engine" if wanted is None else "precision.cross_entropy_loss_fusion: false"
        yield Part("loss", "megatron-core's in float32, unfused", why)
    if found.fused_wgrad:
        yield Part(
            "weight gradients", "added to float32 buffers inside the products", "apex's extension is found"
        )
    elif has_engine:
        yield Part(
            "weight gradients",
            "added to float32 buffers inside Transformer Engine's products; the output layer's after it",
            "apex's extension fused_weight_gradient_mlp_cuda is not installed",
        )
    else:
        yield Part("weight gradients", "added to float32 buffers after each product", "no Transformer Engine")
    adam = "Transformer Engine's FusedAdam" if has_engine else "torch's fused AdamW"
    sharded = (
        "parallel.use_distributed_optimizer" if parallel.use_distributed_optimizer else "not distributed"
    )
    yield Part(
        "optimizer", f"{adam}, {sharded}", _engine_reason(found) if has_engine else "no Transformer Engine"
    )


def _graphs(precision: PrecisionConfig) -> Part:
    impl = precision.cuda_graph_impl
    kernel = (
        "none" if impl == "none" else f"{impl}, {', '.join(precision.cuda_graph_scope or ['whole layers'])}"
    )
    return Part("CUDA graphs", kernel, "precision.cuda_graph_impl")


def _collectives(found: Probe, parallel: ParallelConfig) -> Part:
    backend = "NCCL" if found.has_cuda else "gloo"
    kernel = f"{backend}, tensor-parallel ones in Transformer Engine's user buffers"
    if not parallel.tp_comm_overlap:
        kernel = backend
    return Part("collectives", kernel, "a CUDA device" if found.has_cuda else "no CUDA device")


@dataclass(frozen=True, slots=True)
class RecipeAnswer:
    """Whether a recipe can be used.

    Attributes:
        recipe: its name.
        description: one line.
        faults: why not; empty where it can.
    """

    recipe: str
    description: str
    faults: tuple[str, ...]


def recipe_answers(found: Probe) -> list[RecipeAnswer]:
    """Every recipe, and what the machine lacks for it."""
    broken = set(found.faults)
    answers = []
    for recipe in RECIPES.values():
        faults = preflight.setting_faults(PrecisionConfig(recipe=recipe.name), found, ParallelConfig())
        reasons = tuple(fault.problem for fault in faults if fault.problem not in broken)
        answers.append(RecipeAnswer(recipe.name, recipe.description, reasons))
    return answers
