"""Precision recipes as data: what each one is, where it runs, and which sizes it takes.

``engine/precision.py`` maps a recipe onto megatron-core's fields; everything else asks this table. The FP8
recipes are Transformer Engine's (2.9 to 2.11): its layers quantize the operands of their matrix products
inside an autocast; norms, attention, embedding, output layer, router and loss stay in bfloat16 or float32.

Invariant: no code below depends on the name of a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RecipeName = Literal["fp32", "bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise", "mxfp8"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One recipe.

    Attributes:
        name: as in ``precision.recipe``.
        description: one line.
        compute_dtype: of activations and of everything that is not quantized.
        fp8: megatron-core's ``TransformerConfig.fp8``: number format of the matrix products; ``hybrid`` is
            e4m3 in the forward pass and e5m2 for gradients. None: not an FP8 recipe.
        fp8_recipe: megatron-core's ``fp8_recipe``: how scales are chosen.
        param_gather: default of ``precision.fp8_param_gather`` under the distributed optimizer; None: this
            engine cannot keep the recipe's parameters in FP8.
        layers_in_bf16: first and last layers may stay in bfloat16.
        amax_history_len: default length in steps of the history of largest values that scales come from, a
            part of the training state; 0: none.
        min_capability: CUDA compute capability that has the kernels.
        max_capability: first capability that has them no more; None: none known.
        min_cuda: CUDA version that torch must have been built for.
        token_multiple: what the tokens of one product must divide by in a forward pass.
        train_token_multiple: the same in training, where they are the inner dimension of a product.
        size_multiple: what the input and output sizes of every linear layer on one rank must divide by.
        gather_multiple: what a rank's share of tokens, and the size, must divide by where sequence
            parallelism gathers quantized activations; 1: no further demand.
        peak_of_bf16: peak matrix-product rate over that of bfloat16, by data sheet.
    """

    name: RecipeName
    description: str
    compute_dtype: Literal["fp32", "bf16"]
    fp8: Literal["hybrid", "e4m3"] | None = None
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None
    param_gather: bool | None = None
    layers_in_bf16: bool = False
    amax_history_len: int = 0
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    min_cuda: tuple[int, int] | None = None
    token_multiple: int = 1
    train_token_multiple: int = 1
    size_multiple: int = 1
    gather_multiple: int = 1
    peak_of_bf16: float = 1.0

    @property
    def is_fp8(self) -> bool:
        """Whether matrix products are in FP8, which needs Transformer Engine's layers."""
        return self.fp8 is not None

    @property
    def has_amax_history(self) -> bool:
        """Whether scales come from a history of largest values."""
        return self.amax_history_len > 0


RECIPES: dict[RecipeName, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp32", "parameters, activations and gradients in float32", "fp32"),
        Recipe("bf16", "parameters and activations in bfloat16, optimizer in float32", "bf16"),
        Recipe(
            "fp8_tensorwise",
            "FP8 products, each tensor scaled by its present largest value; the choice for Hopper",
            "bf16",
            fp8="hybrid",
            fp8_recipe="tensorwise",
            param_gather=True,
            layers_in_bf16=True,
            min_capability=(8, 9),
            min_cuda=(12, 1),
            token_multiple=8,
            train_token_multiple=16,
            size_multiple=16,
            peak_of_bf16=2.0,
        ),
        Recipe(
            "fp8_delayed",
            "FP8 products, each tensor scaled by the largest value of earlier steps",
            "bf16",
            fp8="hybrid",
            fp8_recipe="delayed",
            param_gather=False,
            amax_history_len=1024,
            min_capability=(8, 9),
            min_cuda=(12, 1),
            token_multiple=8,
            train_token_multiple=16,
            size_multiple=16,
            peak_of_bf16=2.0,
        ),
        Recipe(
            "fp8_blockwise",
            "FP8 products, activations scaled by 1 x 128 and weights by 128 x 128 values",
            "bf16",
            fp8="e4m3",
            fp8_recipe="blockwise",
            param_gather=False,
            layers_in_bf16=True,
            min_capability=(9, 0),
            min_cuda=(12, 9),
            token_multiple=8,
            train_token_multiple=16,
            size_multiple=16,
            gather_multiple=128,
            peak_of_bf16=2.0,
        ),
        Recipe(
            "mxfp8",
            "FP8 products, scaled by 32 values; Blackwell only",
            "bf16",
            fp8="e4m3",
            fp8_recipe="mxfp8",
            layers_in_bf16=True,
            min_capability=(10, 0),
            max_capability=(12, 0),
            min_cuda=(12, 8),
            token_multiple=32,
            train_token_multiple=32,
            size_multiple=32,
            peak_of_bf16=2.0,
        ),
    )
}
