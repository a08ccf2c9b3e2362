"""Names of all files of a job, and the locks that let one process at a time plan or merge.

    PREFIX_KEY_document.{bin,idx,edits,manifest.json,stats.json}    the outputs
    PREFIX_KEY_document_loss_mask.{bin,idx}                         of conversations
    PREFIX.work/plan.json                                           what the job is
    PREFIX.work/complete.json                                       written last, after the merge
    PREFIX.work/{plan,units}.lock                                   empty
    PREFIX.work/units/0000/0000012_KEY.{bin,idx,edits}              a unit's part of each output
    PREFIX.work/units/0000/0000012.json                             its marker: the unit is done; its counts

Invariant: a marker appears, by rename, after all files of its unit; ``complete.json`` after all outputs.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.dataset.journal_format import JOURNAL_SUFFIX
from megatron_tokedit.dataset.loss_mask import LOSS_MASK_SUFFIXES
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)
_OUTPUT_SUFFIXES = (".bin", ".idx", ".manifest.json", ".stats.json")


def output_suffixes(config: PreprocessConfig) -> tuple[str, ...]:
    """Suffixes of the files that a job leaves of each dataset."""
    edits = (JOURNAL_SUFFIX,) if config.edits else ()
    return (*_OUTPUT_SUFFIXES, *edits, *(LOSS_MASK_SUFFIXES if config.is_sft else ()))


@dataclass(frozen=True, slots=True)
class WorkDir:
    """The files of the job with this output prefix."""

    output_prefix: str

    @property
    def root(self) -> Path:
        """``PREFIX.work``."""
        return Path(f"{self.output_prefix}.work")

    @property
    def plan(self) -> Path:
        """The recorded plan."""
        return self.root / "plan.json"

    @property
    def complete(self) -> Path:
        """The marker of a finished job."""
        return self.root / "complete.json"

    @property
    def units(self) -> Path:
        """The folder of the units' parts."""
        return self.root / "units"

    def output(self, key: str) -> str:
        """Prefix of a key's dataset."""
        return f"{self.output_prefix}_{key}_document"

    def unit_part(self, unit_id: int, key: str) -> str:
        """Prefix of a unit's part of a key's dataset."""
        return f"{self._unit(unit_id)}_{key}"

    def unit_marker(self, unit_id: int) -> Path:
        """The marker of a finished unit."""
        return Path(f"{self._unit(unit_id)}.json")

    def done_units(self) -> Iterator[int]:
        """Ids of the finished units, without order: as many reads of folders as there are thousands."""
        for marker in self.units.glob("*/*.json"):
            if marker.stem.isdecimal():
                yield int(marker.stem)

    def _unit(self, unit_id: int) -> str:
        """A thousand units a folder."""
        return f"{self.units}/{unit_id // 1000:04d}/{unit_id:07d}"

    def is_untouched(self) -> bool:
        """Whether no unit is done and no process is at work, so that nothing hangs on the recorded plan."""
        if self.complete.exists() or any(self.units.glob("*/*.json")):
            return False
        with open(self.root / "units.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True

    def make(self) -> None:
        """Make the folder.

        Raises:
            DataFormatError: it cannot be made.
        """
        make_folder(self.root)

    @contextmanager
    def lock(self, what: Literal["plan", "units"], *, shared: bool = False) -> Iterator[bool]:
        """Hold one of the job's locks; released when the process ends, however it ends.

        The plan's lock is held while the plan is made. The units' lock is shared by all who write units, and
        held alone by the one who merges or discards them.

        Yields:
            Whether the lock is held. Where the file system has no locks the block runs without one: what it
            writes is the same whoever writes it, and appears by rename.
        """
        with file_lock(self.root / f"{what}.lock", shared=shared) as held:
            yield held


@contextmanager
def file_lock(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold the lock of a file, which is made; released when the process ends, however it ends.

    Yields:
        Whether the lock is held; False where the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(path, "w") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for another process of this job", path.parent)
            fcntl.flock(file, kind)
        except OSError as error:
            logger.warning("%s: no file locks here (%s); going on without", path.parent, error.strerror)
            yield False
            return
        yield True


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        DataFormatError: the operating system refuses.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise DataFormatError(f"cannot make the folder {path}: {error.strerror}") from error
