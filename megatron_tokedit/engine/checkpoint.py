"""Distributed checkpoints: megatron-core's sharded format in a folder that is either whole or recognisably
not (``checkpoint_folder`` has its layout).

Invariant: older checkpoints are removed only after the new one passed the test of completeness. Any (tensor,
pipeline, data) layout and any precision recipe loads what any other saved (``extra_state`` says what of FP8
goes on); the random states are restored only under the layout that saved them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tokedit.config.training import CheckpointConfig
from megatron_tokedit.engine import checkpoint_folder, extra_state
from megatron_tokedit.engine.background_save import BackgroundSave, writing
from megatron_tokedit.engine.checkpoint_shards import check_shards
from megatron_tokedit.engine.cuda_graphs import plain_states, tracked_states
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.main_parameters import refresh_weights, reload_main_parameters
from megatron_tokedit.engine.model import gather_parameters, unwrap
from megatron_tokedit.engine.optimizer import load_optimizer
from megatron_tokedit.engine.optimizer_parts import fit_parts
from megatron_tokedit.errors import CheckpointError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _layout(ctx: ParallelContext) -> dict[str, int]:
    """Every size that decides what a rank computes; those added later only where they are not 1."""
    rare = {"context": ctx.cp_size, "expert": ctx.ep_size, "chunks": ctx.vp_size}
    return {
        "tensor": ctx.tp_size,
        "pipeline": ctx.pp_size,
        "data": ctx.dp_size,
        **{name: size for name, size in rare.items() if size > 1},
    }


def _model_keys(model: list[Any]) -> list[str]:
    """Names of the chunks in a state dict, as in Megatron-LM."""
    return ["model"] if len(model) == 1 else [f"model{chunk}" for chunk in range(len(model))]


def _random_states() -> dict[str, Any]:
    from megatron.core import tensor_parallel

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": plain_states(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states(tracked_states(states["tracker"], tracker.get_states()))


def _random_state_object(ctx: ParallelContext, states: dict[str, Any] | None) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject("random_states", states, (ctx.world_size,), (ctx.rank,), replica_id=0)


def _sharded_state(
    model: list[Any], optimizer: Any | None, scheduler: Any | None, *, is_loading: bool
) -> dict[str, Any]:
    """The state dict that megatron-core saves or loads; collective while saving."""
    from megatron.core import parallel_state

    if not is_loading:
        gather_parameters(model)
    metadata = {
        **_SHARDING,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    chunks = {
        key: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for key, chunk in zip(_model_keys(model), model, strict=True)
    }
    state: dict[str, Any] = dict(chunks)
    if optimizer is not None:
        of_model = chunks["model"] if len(model) == 1 else chunks
        state["optimizer"] = optimizer.sharded_state_dict(of_model, is_loading=is_loading, metadata=metadata)
    if not is_loading:
        extra_state.dequantize(chunks)
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
    return state


def _empty_partial(folder: Path, ctx: ParallelContext) -> Path:
    """Make the folder that becomes ``folder`` once it is written. Collective over the world."""
    partial = folder.with_name(folder.name + checkpoint_folder.PARTIAL_SUFFIX)

    def make() -> None:
        checkpoint_folder.remove_partial(folder.parent)
        partial.mkdir(parents=True)

    _on_rank_zero(ctx, partial, make)
    return partial


def _on_rank_zero(ctx: ParallelContext, partial: Path, action: Callable[[], None]) -> None:
    """Do something on rank 0 for all. Collective over the world.

    Raises:
        CheckpointError: on every rank, if it failed.
    """
    message: list[str | None] = [None]
    if ctx.rank == 0:
        try:
            action()
        except (OSError, CheckpointError) as error:
            text = str(error)
            message = [text if text.startswith(str(partial)) else f"{partial}: cannot be written ({text})"]
    if ctx.world_size > 1:
        dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise CheckpointError(message[0])


def _finish(
    partial: Path, folder: Path, state: dict[str, Any], run_config: dict[str, Any], settings: CheckpointConfig
) -> None:
    """On rank 0, after all shards: check, name, and only then prune."""
    check_shards(partial)
    checkpoint_folder.finish(partial, folder, state, run_config)
    checkpoint_folder.prune(folder.parent, settings.keep_last, settings.keep_every_steps)


def save(
    checkpoints_dir: str | Path,
    *,
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    state: dict[str, Any],
    run_config: dict[str, Any],
    ctx: ParallelContext,
    settings: CheckpointConfig = CheckpointConfig(),  # noqa: B008 - frozen
    background: BackgroundSave | None = None,
) -> Path:
    """Save a checkpoint and return its folder. Collective over the world.

    Args:
        checkpoints_dir: ``RUN_DIR/checkpoints``; made if needed.
        model: from ``build_model``.
        optimizer: from ``build_optimizer``.
        scheduler: from ``build_scheduler``.
        state: JSON-able; must hold ``step``, and for scoring ``vocab_size``; tokenizer, versions, consumed
            samples belong here too. The layout is added.
        run_config: the resolved configuration (JSON-able), with the section ``model``.
        ctx: the layout.
        settings: ``keep_last``, ``keep_every_steps`` and ``fully_parallel_save`` count.
        background: write there and return at once; the folder appears when it is finished. A save that is
            still being written is waited for first.

    Raises:
        CheckpointError: on every rank, if a rank could not write.
    """
    from megatron.core import dist_checkpointing

    from megatron_tokedit.engine.save_strategy import save_strategy

    if background is not None:
        background.wait()
    folder = checkpoint_folder.step_folder(checkpoints_dir, int(state["step"]))
    partial = _empty_partial(folder, ctx)
    sharded = _sharded_state(model, optimizer, scheduler, is_loading=False)
    sharded["random_states"] = _random_state_object(ctx, _random_states())
    strategy = save_strategy(
        in_background=background is not None, fully_parallel=settings.fully_parallel_save and ctx.dp_size > 1
    )

    def finish() -> None:
        """After all shards."""
        whole = {**state, "layout": _layout(ctx)}
        _on_rank_zero(ctx, partial, lambda: _finish(partial, folder, whole, run_config, settings))

    with writing(partial):
        request = dist_checkpointing.save(
            sharded, str(partial), sharded_strategy=strategy, async_sharded_save=background is not None
        )
    if background is None:
        finish()
    else:
        background.start(request, partial, folder, finish)
    return folder


def load(
    path: str | Path,
    *,
    model: list[Any],
    optimizer: Any | None,
    scheduler: Any | None,
    ctx: ParallelContext,
    random_states: bool = True,
    fully_parallel: bool = False,
    main_parameters_of: Any | None = None,
) -> dict[str, Any]:
    """Load the newest complete checkpoint under ``path`` into model, optimizer and scheduler.

    Collective over the world. Optimizer hyper-parameters and the schedule's shape stay those of the current
    configuration; its position is restored.

    Args:
        path: a step folder, a run folder, or its ``checkpoints`` folder.
        model: from ``build_model``.
        optimizer: from ``build_optimizer``, or None to leave optimizer and random states alone.
        scheduler: from ``build_scheduler``, or None.
        ctx: the layout; need not be the one that saved.
        random_states: restore them too, where an optimizer is loaded under the layout that saved.
        fully_parallel: data-parallel ranks share the reading and exchange what they read.
        main_parameters_of: an optimizer of ``model`` that is not loaded, but starts from the weights.

    Returns:
        The content of ``state.json``.

    Raises:
        CheckpointError: nothing complete there, or a model of another shape.
    """
    folder = checkpoint_folder.require(path)
    state = checkpoint_folder.read_json(folder, checkpoint_folder.STATE_FILE)
    sharded = _sharded_state(model, optimizer, None, is_loading=True)
    wants_random_states = optimizer is not None and random_states
    if wants_random_states and state.get("layout") == _layout(ctx):
        sharded["random_states"] = _random_state_object(ctx, None)
    names, recipe = _model_keys(model), extra_state.recipe_of(unwrap(model[0]).config)
    removed = extra_state.take_out({name: sharded[name] for name in names}, folder, recipe)
    loaded = _dist_load(sharded, folder, fully_parallel=fully_parallel and ctx.dp_size > 1)
    weights = {name: loaded[name] for name in names}
    extra_state.put_back(weights, removed)
    for name, chunk in zip(names, model, strict=True):
        unwrap(chunk).load_state_dict(weights[name], strict=True)
    if main_parameters_of is not None:
        reload_main_parameters(main_parameters_of, model, weights, names)
    if optimizer is not None:
        load_optimizer(optimizer, fit_parts(optimizer, loaded["optimizer"]))
        if recipe != extra_state.recorded_recipe(folder) or extra_state.has_fp8_parameters(model):
            refresh_weights(optimizer, model)
    if scheduler is not None:
        scheduler.num_steps = 0  # loading adds to it
        scheduler.load_state_dict(loaded["scheduler"])
    if optimizer is not None or main_parameters_of is not None:
        extra_state.log_change(folder, recipe)
    _restore_random_states(
        loaded.get("random_states"), folder, wanted=optimizer is not None and random_states
    )
    return state


def _restore_random_states(states: dict[str, Any] | None, folder: Path, *, wanted: bool) -> None:
    """Set the loaded random states, or say why there are none."""
    if states is not None and (states["cuda"] is not None) == torch.cuda.is_available():
        _set_random_states(states)
    elif states is not None:
        logger.info("%s was saved on another kind of device: random states start from the seed", folder)
    elif wanted:
        logger.info("%s was saved under another layout: random states start from the seed", folder)


def _dist_load(sharded: dict[str, Any], folder: Path, *, fully_parallel: bool) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from megatron_tokedit.engine.save_strategy import load_strategy

    try:
        strategy = load_strategy(folder) if fully_parallel else None
        return dict(dist_checkpointing.load(sharded, str(folder), sharded_strategy=strategy))
    except (CheckpointingException, KeyError, dist.checkpoint.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"{folder}: does not fit the configured model or optimizer ({reason[:300]}); "
            f"compare the 'model' section with {folder / checkpoint_folder.RUN_CONFIG_FILE}"
        ) from error
