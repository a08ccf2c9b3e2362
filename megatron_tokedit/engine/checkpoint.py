"""Distributed checkpoints: megatron-core's sharded format in a folder that is either whole or recognisably
not (``checkpoint_folder`` has its layout).

Invariant: older checkpoints are removed only after the new one passed the test of completeness. Any (tensor,
pipeline, data) layout loads what any other saved; the random states are restored only under the layout that
saved them.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tokedit.engine.checkpoint_folder import (
    LATEST,
    MARKER,
    PARTIAL_SUFFIX,
    RUN_CONFIG_FILE,
    STATE_FILE,
    complete_steps,
    is_complete,
    read_json,
    require,
    step_folder,
    write_json,
)
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.model import unwrap
from megatron_tokedit.engine.optimizer import load_optimizer
from megatron_tokedit.errors import CheckpointError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _layout(ctx: ParallelContext) -> dict[str, int]:
    return {"tensor": ctx.tp_size, "pipeline": ctx.pp_size, "data": ctx.dp_size}


def _random_states() -> dict[str, Any]:
    from megatron.core import tensor_parallel

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    from megatron.core import tensor_parallel

    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _random_state_object(ctx: ParallelContext, states: dict[str, Any] | None) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject("random_states", states, (ctx.world_size,), (ctx.rank,), replica_id=0)


def _sharded_state(
    model: list[Any], optimizer: Any | None, scheduler: Any | None, *, is_loading: bool
) -> dict[str, Any]:
    """The state dict that megatron-core saves or loads; collective while saving."""
    from megatron.core import parallel_state

    metadata = {
        **_SHARDING,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {"model": unwrap(model[0]).sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            state["model"], is_loading=is_loading, metadata=metadata
        )
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
    return state


def save(
    checkpoints_dir: str | Path,
    *,
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    state: dict[str, Any],
    run_config: dict[str, Any],
    ctx: ParallelContext,
    keep_last: int = 0,
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
        keep_last: afterwards keep only the newest so many complete checkpoints (0: all).

    Raises:
        CheckpointError: on every rank, if a rank could not write.
    """
    from megatron.core import dist_checkpointing

    from megatron_tokedit.engine.save_strategy import InProcessSave

    folder = step_folder(checkpoints_dir, int(state["step"]))
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    if ctx.rank == 0:
        for leftover in Path(checkpoints_dir).glob(f"step_*{PARTIAL_SUFFIX}"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    ctx.barrier()
    sharded = _sharded_state(model, optimizer, scheduler, is_loading=False)
    sharded["random_states"] = _random_state_object(ctx, _random_states())
    try:
        dist_checkpointing.save(sharded, str(partial), sharded_strategy=InProcessSave())
    except dist.checkpoint.api.CheckpointException as error:  # on every rank, whichever failed
        reasons = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())
        raise CheckpointError(
            f"{partial}: cannot be written ({reasons[:300]}); is the disk full? "
            f"Older checkpoints are untouched"
        ) from error
    if ctx.rank == 0:
        _finish(partial, folder, {**state, "layout": _layout(ctx)}, run_config, keep_last)
    ctx.barrier()
    return folder


def _finish(
    partial: Path, folder: Path, state: dict[str, Any], run_config: dict[str, Any], keep_last: int
) -> None:
    """On rank 0, after all shards: the JSON files, the marker, ``latest``, and only then the pruning."""
    write_json(partial / STATE_FILE, state)
    write_json(partial / RUN_CONFIG_FILE, run_config)
    files = {entry.name: entry.stat().st_size for entry in sorted(partial.iterdir())}
    write_json(partial / MARKER, {"files": files})
    if not is_complete(partial):
        raise CheckpointError(f"{partial}: written, but not readable as a whole; is the disk full?")
    if folder.exists():
        _remove(folder)
    os.replace(partial, folder)
    latest = folder.parent / f"{LATEST}{PARTIAL_SUFFIX}"
    latest.write_text(folder.name + "\n")
    os.replace(latest, folder.parent / LATEST)
    logger.info("checkpoint %s (%.1f MB)", folder, sum(files.values()) / 1e6)
    if keep_last:
        for _, old in complete_steps(folder.parent)[:-keep_last]:
            _remove(old)


def _remove(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)  # first, so that a half-removed folder never looks whole
    shutil.rmtree(folder)


def load(
    path: str | Path, *, model: list[Any], optimizer: Any | None, scheduler: Any | None, ctx: ParallelContext
) -> dict[str, Any]:
    """Load the newest complete checkpoint under ``path`` into model, optimizer and scheduler.

    Collective over the world. Optimizer hyper-parameters and the schedule's shape stay those of the current
    configuration; its position is restored.

    Args:
        path: a step folder, a run folder, or its ``checkpoints`` folder.
        model: from ``build_model``.
        optimizer: from ``build_optimizer``, or None to leave optimizer and random states alone; an optimizer
            built before must then be told by ``optimizer.reload_model_params()``.
        scheduler: from ``build_scheduler``, or None.
        ctx: the layout; need not be the one that saved.

    Returns:
        The content of ``state.json``.

    Raises:
        CheckpointError: nothing complete there, or a model of another shape.
    """
    folder = require(path)
    state = read_json(folder, STATE_FILE)
    sharded = _sharded_state(model, optimizer, None, is_loading=True)
    same_layout = state.get("layout") == _layout(ctx)
    if optimizer is not None and same_layout:
        sharded["random_states"] = _random_state_object(ctx, None)
    loaded = _dist_load(sharded, folder)
    unwrap(model[0]).load_state_dict(loaded["model"], strict=True)
    if optimizer is not None:
        load_optimizer(optimizer, loaded["optimizer"])
    if scheduler is not None:
        scheduler.num_steps = 0  # loading adds to it
        scheduler.load_state_dict(loaded["scheduler"])
    if "random_states" in sharded:
        _set_random_states(loaded["random_states"])
    elif optimizer is not None:
        logger.info("%s was saved under another layout: random states start from the seed", folder)
    return state


def _dist_load(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        return dict(dist_checkpointing.load(sharded, str(folder)))
    except (CheckpointingException, KeyError, dist.checkpoint.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"{folder}: does not fit the configured model or optimizer ({reason[:300]}); "
            f"compare the 'model' section with {folder / RUN_CONFIG_FILE}"
        ) from error
