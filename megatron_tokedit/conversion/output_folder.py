"""The folder that a conversion writes: whole under its name, or not there.

Invariant: everything is written into ``OUTPUT.partial``; the name changes when all of it is on the disk. What
lay there before is removed only then, and only if a conversion could have written it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import CheckpointError

PARTIAL_SUFFIX = ".partial"
_REPLACED_SUFFIX = ".replaced"


def refuse_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        CheckpointError: it is there already, it is the input or part of it, or it is not a conversion's.
    """
    ours, theirs = output.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise CheckpointError(
            f"--output {output}: is the input, or inside it, or around it; give another folder"
        )
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"--output {output}: exists; give another folder, or --overwrite to replace it")
    if not _is_replaceable(output):
        raise CheckpointError(
            f"--output {output}: is neither a Hugging Face model folder nor a converted checkpoint, so "
            "--overwrite does not replace it; remove it yourself or give another folder"
        )


def _is_replaceable(output: Path) -> bool:
    if (output / "config.json").is_file() and any(output.glob("*.safetensors")):
        return True
    checkpoints_dir = output / "checkpoints"
    names = {entry.name for entry in checkpoints_dir.iterdir()} if checkpoints_dir.is_dir() else set()
    return bool(names) and names <= {checkpoint_folder.step_folder("", 0).name, checkpoint_folder.LATEST}


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` when the block ends without an error."""
    partial = output.with_name(output.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = output.with_name(output.name + _REPLACED_SUFFIX)
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        os.replace(output, replaced)
    os.replace(partial, output)
    shutil.rmtree(replaced, ignore_errors=True)
