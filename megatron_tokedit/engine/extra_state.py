"""What Transformer Engine adds to a checkpoint: ``_extra_state`` entries, and weights kept in FP8.

Under a recipe with amax histories (``fp8_delayed``) a layer's extra state holds its scales and histories;
under every other it holds nothing that a run needs, and megatron-core's own layers answer None. Which modules
have an entry differs too: Transformer Engine's norms have one, the local ones do not.

==================  ================  ========================================================================
written under       loaded under      what happens
==================  ================  ========================================================================
``fp8_delayed``     ``fp8_delayed``   scales and histories go on as they were
any other           ``fp8_delayed``   histories start empty, as in a new run: the first forward scales by 1
any                 any other         extra states are left in the file
==================  ================  ========================================================================

Invariant: a checkpoint holds no FP8 tensor and needs no Transformer Engine to be read, and it loads whatever
kind of layers wrote it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_tokedit.config.recipes import RECIPES, RecipeName
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

_SUFFIX = "_extra_state"

Chunks = dict[str, dict[str, Any]]
"""Name of a chunk of the model -> its sharded, or loaded, state dict."""


def recipe_of(config: Any) -> RecipeName:
    """Name of the recipe that a ``TransformerConfig`` was made from."""
    if config.fp8:
        return next(name for name, recipe in RECIPES.items() if recipe.fp8_recipe == config.fp8_recipe)
    return "bf16" if config.bf16 else "fp32"


def recorded_recipe(folder: Path) -> RecipeName | None:
    """Name of the recipe that a checkpoint was trained under; None where it does not say.

    Raises:
        CheckpointError: the record is missing or damaged.
    """
    run_config = checkpoint_folder.read_json(folder, checkpoint_folder.RUN_CONFIG_FILE)
    recorded = run_config.get("precision", {}).get("recipe")
    return next((name for name in RECIPES if name == recorded), None)


def dequantize(chunks: Chunks) -> None:
    """Replace FP8 weights that are to be saved by their values in main memory, in the parameters' dtype.

    The optimizer's sharded state finds its parameters by identity: it has to be made before.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.fp8_utils import is_float8tensor

    for part in nested_values(chunks):
        if is_float8tensor(part.data):
            part.data = part.data.detach().dequantize().cpu()


def take_out(chunks: Chunks, folder: Path, recipe: RecipeName) -> dict[str, list[str]]:
    """Remove the extra states that this load is not to read.

    Args:
        chunks: sharded state dicts of a model; changed in place.
        folder: the checkpoint.
        recipe: of this run.

    Returns:
        Names of the entries that were removed, for :func:`put_back`.
    """
    keeps = RECIPES[recipe].has_amax_history and recorded_recipe(folder) == recipe
    stored = _stored_objects(folder) if keeps else frozenset[str]()
    removed: dict[str, list[str]] = {}
    for chunk, state in chunks.items():
        removed[chunk] = [
            name
            for name, part in state.items()
            if _SUFFIX in name.rpartition(".")[2] and part.unique_key not in stored
        ]
        for name in removed[chunk]:
            del state[name]
    return removed


def put_back(loaded: Chunks, removed: dict[str, list[str]]) -> None:
    """Enter None for what :func:`take_out` removed: every kind of layer takes that for "nothing to load"."""
    for chunk, names in removed.items():
        loaded[chunk].update(dict.fromkeys(names))


def _stored_objects(folder: Path) -> frozenset[str]:
    """Keys of all objects, other than tensors, in a checkpoint."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    found = load_sharded_metadata(str(folder)).values()
    return frozenset(part.unique_key for part in found if isinstance(part, ShardedObject))


def log_change(folder: Path, recipe: RecipeName) -> None:
    """Say what becomes of scaling histories where a run goes on from a checkpoint of another recipe."""
    recorded = recorded_recipe(folder)
    if recorded is None or recorded == recipe:
        return
    logger.info(
        "%s was trained under precision recipe %s, this run goes on under %s", folder, recorded, recipe
    )
    if RECIPES[recipe].has_amax_history:
        logger.info("amax histories start empty: the first forward pass scales every FP8 tensor by 1")
    elif RECIPES[recorded].has_amax_history:
        logger.info("its scales and amax histories are left behind: %s has none", recipe)


def has_fp8_parameters(model: list[Any]) -> bool:
    """Whether a model keeps weights in FP8."""
    from megatron.core.fp8_utils import is_float8tensor

    return any(is_float8tensor(parameter) for chunk in model for parameter in chunk.parameters())


def plain(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values as an ordinary tensor, whether it is kept in FP8 or not."""
    from megatron.core.fp8_utils import is_float8tensor

    values = parameter.detach()
    return values.dequantize() if is_float8tensor(parameter) else values
