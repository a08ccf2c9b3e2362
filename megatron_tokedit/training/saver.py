"""Saves a run's checkpoints, waited for or in the background.

Invariant: when a run ends, the checkpoint of its last step is complete.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_tokedit.config.record import to_mapping
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.engine import checkpoint
from megatron_tokedit.engine.background_save import BackgroundSave
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

_RECORDED_PACKAGES = ("megatron_tokedit", "torch", "megatron-core", "numpy")


class Saver:
    """Its methods are collective over the world."""

    def __init__(
        self, config: RunConfig, ctx: ParallelContext, checkpoint_dir: Path, *, latest: str | None
    ) -> None:
        """Save into ``checkpoint_dir``, whose newest complete checkpoint is ``latest``."""
        self._config, self._ctx, self._checkpoint_dir = config, ctx, checkpoint_dir
        self._background = BackgroundSave()
        self._latest = latest

    @property
    def latest(self) -> str | None:
        """The newest complete checkpoint."""
        return self._latest

    def save(
        self, *, model: list[Any], optimizer: Any, scheduler: Any, state: Mapping[str, Any], last: bool
    ) -> None:
        """Save; with ``checkpoint.async_save`` return before it is written, except for the ``last`` one.

        Raises:
            CheckpointError: on every rank, if a rank could not write this one or the one before.
        """
        started = time.perf_counter()
        in_background = self._config.checkpoint.async_save and not last
        self.wait()
        folder = checkpoint.save(
            self._checkpoint_dir,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            state={**state, "versions": {name: version(name) for name in _RECORDED_PACKAGES}},
            run_config=to_mapping(self._config),
            ctx=self._ctx,
            settings=self._config.checkpoint,
            background=self._background if in_background else None,
        )
        if in_background:
            logger.info("writing checkpoint %s in the background", folder.name)
        else:
            self._latest = str(folder)
        logger.info("training waited %.1f s for the checkpoint", time.perf_counter() - started)

    def poll(self) -> None:
        """Finish a background save that every rank has written."""
        self._background.poll()
        self._take_over()

    def wait(self) -> None:
        """Wait for a background save and finish it."""
        self._background.wait()
        self._take_over()

    def _take_over(self) -> None:
        if self._background.finished is not None:
            self._latest = str(self._background.finished)
            self._background.finished = None
