"""Where a run's first step of this start comes from: its own newest checkpoint, or another run's weights.

Invariant: a run that has a checkpoint of its own never looks at ``init_from`` again, so a resumed
continuation goes on with its own weights, position and schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tokedit.config.record import to_mapping
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset.rank_zero import from_rank_zero
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.log import get_logger
from megatron_tokedit.training.resume import check_continuable, check_resumable

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a start goes on from.

    Attributes:
        folder: the checkpoint; None for fresh weights.
        is_own: it is the run's own, so position, schedule and random states come along.
        state: its ``state.json``.
        lineage: the runs that this one's weights come from, oldest first, as recorded in its checkpoints.
    """

    folder: str | None = None
    is_own: bool = False
    state: Mapping[str, Any] = field(default_factory=dict)
    lineage: tuple[Mapping[str, Any], ...] = ()


def find_origin(
    config: RunConfig, tokenizer_spec: Mapping[str, Any], checkpoint_dir: Path, *, speaks: bool
) -> Origin:
    """Find it, as rank 0 sees it, and check that it fits. Collective over the world.

    Args:
        config: resolved.
        tokenizer_spec: of this run's tokenizer.
        checkpoint_dir: of this run.
        speaks: whether to log what has changed; true on one rank only.

    Raises:
        CheckpointError: it does not fit the model or the tokenizer, or ``init_from`` names no checkpoint.
        ConfigError: the optimizer of a checkpoint is to be kept that has none.
    """
    found = from_rank_zero(lambda: checkpoint_folder.find_latest(checkpoint_dir))
    initial = config.init_from
    if found is None and initial is None:
        return Origin()
    folder = str(found or from_rank_zero(lambda: checkpoint_folder.require(initial.checkpoint)))  # type: ignore[union-attr]
    state = checkpoint_folder.read_json(folder, checkpoint_folder.STATE_FILE)
    recorded = checkpoint_folder.read_json(folder, checkpoint_folder.RUN_CONFIG_FILE)
    if found is None and initial is not None and initial.optimizer == "kept" and "converted_from" in state:
        raise ConfigError(
            f"init_from.optimizer: kept, but {folder} was converted from a Hugging Face model and has no "
            "optimizer state, only weights; set init_from.optimizer: fresh"
        )
    check = check_continuable if found is None else check_resumable
    changes = check(
        folder,
        recorded_config=recorded,
        config=to_mapping(config),
        recorded_tokenizer=state["tokenizer"],
        tokenizer=tokenizer_spec,
    )
    for change in changes if speaks else ():
        logger.warning("changed since %s: %s", Path(folder).name, change)
    lineage = tuple(state.get("lineage", ()))
    if found is None and initial is not None:
        ancestor = {
            "checkpoint": folder,
            "run_dir": recorded.get("run_dir"),
            "step": state["step"],
            "consumed_tokens": state.get("consumed_tokens"),
            "optimizer": initial.optimizer,
        }
        lineage = (*lineage, ancestor)
    return Origin(folder, found is not None, state, lineage)
