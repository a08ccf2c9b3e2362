"""Whether FP8 is really at work: what the linear layers of a model say after a step, and how far an FP8
product is from the exact one.

megatron-core trains without FP8, and without a word, where Transformer Engine's layers or its autocast are
missing. Invariant: nothing here looks at the configuration of a model; only what its modules did counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.model import transformer_config

_SCALINGS = {
    "tensorwise": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
"""megatron-core's ``fp8_recipe`` -> the class of Transformer Engine's recipe (megatron-core's own subclass of
delayed scaling is ``TEDelayedScaling``)."""
_WARM_UP_STEPS = 3
"""Delayed scaling takes its scales from earlier steps; before there are any it knows nothing."""
_HEAD_SIZE = 64


@dataclass(frozen=True, slots=True)
class Fp8Evidence:
    """What the linear layers of a model did in their last forward pass.

    Attributes:
        num_linear: Transformer Engine's linear layers.
        num_active: of them, those that computed in FP8.
        scalings: class names of the recipes that they used.
        num_fp8_weights: weights that are kept in FP8.
        smallest_amax: of the layers' largest values in their amax histories, the smallest; None where the
            recipe has none.
    """

    num_linear: int
    num_active: int
    scalings: tuple[str, ...]
    num_fp8_weights: int
    smallest_amax: float | None


def _linear_layers(model: list[Any]) -> Iterator[torch.nn.Module]:
    """Transformer Engine's linear layers: they have FP8 state and matrices (its attention has none)."""
    for chunk in model:
        for module in chunk.modules():
            if isinstance(getattr(module, "fp8_meta", None), dict) and _matrices(module):
                yield module


def _matrices(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse=False) if parameter.ndim >= 2]


def _amax(module: Any) -> float | None:
    history = getattr(module.fp8_meta.get("scaling_fwd"), "amax_history", None)
    return None if history is None else float(history.max())


def fp8_evidence(model: list[Any]) -> Fp8Evidence:
    """Look at a model that has made a step. Not collective: it sees this rank's layers.

    Args:
        model: from ``build_model``.
    """
    layers = list(_linear_layers(model))
    active: list[Any] = [layer for layer in layers if layer.fp8]
    amaxes = [amax for amax in map(_amax, active) if amax is not None]
    return Fp8Evidence(
        num_linear=len(layers),
        num_active=len(active),
        scalings=tuple(sorted({type(layer.fp8_meta["recipe"]).__name__ for layer in active})),
        num_fp8_weights=sum(hasattr(matrix, "_quantizer") for layer in layers for matrix in _matrices(layer)),
        smallest_amax=min(amaxes, default=None),
    )


def evidence_faults(found: Fp8Evidence, precision: PrecisionConfig, parallel: ParallelConfig) -> list[str]:
    """What speaks against a recipe having been at work, one sentence each.

    Args:
        found: of a model without layers that stay in bfloat16.
        precision: the recipe.
        parallel: the layout.
    """
    recipe = RECIPES[precision.recipe]
    if not recipe.is_fp8:
        return [f"{found.num_active} layers computed in FP8 under {recipe.name}"] if found.num_active else []
    if not found.num_linear:
        return ["the model has no linear layer of Transformer Engine"]
    faults = []
    if found.num_active < found.num_linear:
        faults.append(f"{found.num_active} of {found.num_linear} linear layers computed in FP8")
    wanted = _SCALINGS[str(recipe.fp8_recipe)]
    faults += [f"a layer used {name}, not {wanted}" for name in found.scalings if not name.endswith(wanted)]
    if recipe.has_amax_history and not found.smallest_amax:
        faults.append("the amax history of a layer is empty")
    if precision.keeps_fp8_parameters(parallel) and not found.num_fp8_weights:
        faults.append("no weight is kept in FP8, though the parameters are to be gathered so")
    return faults


def linear_errors(
    recipe: str, ctx: ParallelContext, *, num_tokens: int, input_size: int, output_size: int
) -> dict[str, dict[str, float]]:
    """How far one linear layer of Transformer Engine is from the exact product of its bfloat16 operands.

    Args:
        recipe: an FP8 recipe.
        ctx: a CUDA device and one rank.
        num_tokens: rows of the input.
        input_size: K; a multiple of 64.
        output_size: N.

    Returns:
        For ``bf16`` and ``fp8``: relative errors (Frobenius norms) of ``output``, ``input_grad`` and
        ``weight_grad``.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
    from megatron.core.fp8_utils import get_fp8_context

    heads = input_size // _HEAD_SIZE
    model = ModelConfig(
        num_layers=1, hidden_size=input_size, num_attention_heads=heads, seq_length=num_tokens
    )
    precision = PrecisionConfig.model_validate({"recipe": recipe})
    config = transformer_config(model, precision, ParallelConfig(), ctx.device)
    config.gradient_accumulation_fusion = False  # it would write to a gradient buffer that is not there
    layer = TEColumnParallelLinear(
        input_size,
        output_size,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=False,
        skip_bias_add=True,
        is_expert=False,
    ).to(ctx.device)
    generator = torch.Generator(ctx.device).manual_seed(1)
    made = [
        torch.randn(num_tokens, size, generator=generator, device=ctx.device).bfloat16()
        for size in (input_size, output_size)
    ]
    exact = _exact_product(made[0], layer.weight, made[1])
    errors = {}
    for name in ("bf16", "fp8"):
        for _ in range(_WARM_UP_STEPS):
            layer.is_first_microbatch = True
            context = get_fp8_context(config, 0) if name == "fp8" else contextlib.nullcontext()
            got = _layer_product(layer, made[0], made[1], context)
        errors[name] = {part: _relative_error(got[part], exact[part]) for part in exact}
    return errors


def _exact_product(x_TK: torch.Tensor, weight_NK: torch.Tensor, grad_TN: torch.Tensor) -> Any:
    """Output and gradients in float64."""
    x, weight, grad = (tensor.detach().double() for tensor in (x_TK, weight_NK, grad_TN))
    return {"output": x @ weight.T, "input_grad": grad @ weight, "weight_grad": grad.T @ x}


def _layer_product(layer: Any, x_TK: torch.Tensor, grad_TN: torch.Tensor, context: Any) -> Any:
    """Output and gradients of the layer."""
    x = x_TK.clone().requires_grad_()
    layer.weight.grad = None
    with context:
        output, _ = layer(x)
    output.backward(grad_TN)
    return {"output": output.detach(), "input_grad": x.grad, "weight_grad": layer.weight.grad}


def _relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())
