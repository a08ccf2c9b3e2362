"""One run a run folder: two that wrote checkpoints and metrics into the same one would ruin both.

Invariant: the lock is the operating system's, so it is gone as soon as the process that held it is, however
that one ended.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_tokedit.dataset.rank_zero import from_rank_zero
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

FILE_NAME = "lock"


class RunLock:
    """Context manager: rank 0 holds ``RUN_DIR/lock`` inside it. Entering is collective over the world.

    A record lock, which forked data-loader workers do not inherit.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        from_rank_zero(self._acquire)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _acquire(self) -> None:
        """Make the run folder and lock it.

        Raises:
            ConfigError: the folder cannot be written, or another run holds it.
        """
        path = self.run_dir / FILE_NAME
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise ConfigError(f"run_dir: {self.run_dir} cannot be written: {error.strerror}") from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            raise ConfigError(
                f"run_dir: {self.run_dir} is in use by another run ({owner}); wait for it, or give another "
                f"run_dir"
            ) from None
        except OSError as error:
            logger.warning("%s: no file locks here (%s); going on without", self.run_dir, error.strerror)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
