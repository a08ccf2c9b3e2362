"""The folder that a conversion writes: whole under its name, or not there.

Invariant: everything is written into ``OUTPUT.partial``; the name changes when all of it is on the disk. What
lay there before is removed only then, and only if a conversion could have written it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_tokedit.conversion.safetensors_files import INDEX_FILE
from megatron_tokedit.conversion.tokenizer_files import CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILES
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import CheckpointError

TOKENIZER_FOLDER = "tokenizer"
CONTINUE_FILE = "continue.yaml"
PARTIAL_SUFFIX = ".partial"
_REPLACED_SUFFIX = ".replaced"


def refuse_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        CheckpointError: it is there already, it is the input or part of it, or it is not a conversion's.
    """
    ours, theirs = output.resolve(), source.resolve()
    if not output.name:
        raise CheckpointError(f"--output {str(output)!r}: has no name of its own; give the folder's name")
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
    """Whether nothing lies there but what a conversion writes; a trainer's output folder has more."""
    entries = list(output.iterdir()) if output.is_dir() else []
    names = {entry.name for entry in entries}
    if CONFIG_FILE in names and any(name.endswith(".safetensors") for name in names):
        return all(entry.is_file() and _is_published(entry.name) for entry in entries)
    checkpoints_dir = output / "checkpoints"
    steps = {entry.name for entry in checkpoints_dir.iterdir()} if checkpoints_dir.is_dir() else set()
    return (
        bool(steps)
        and steps <= {checkpoint_folder.step_folder("", 0).name, checkpoint_folder.LATEST}
        and names <= {checkpoints_dir.name, TOKENIZER_FOLDER, CONTINUE_FILE}
    )


def _is_published(name: str) -> bool:
    known = {CONFIG_FILE, GENERATION_FILE, INDEX_FILE, *TOKENIZER_FILES}
    return name in known or name.endswith(".safetensors")


@contextmanager
def staged(output: Path, *, before_naming: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` when the block ends without an error.

    Args:
        output: what lies there is removed.
        before_naming: called when all is written; raises where ``output`` must stay as it is by now.

    Raises:
        CheckpointError: a file lies where the folder is to be made, or another conversion is writing it.
    """
    partial = output.with_name(output.name + PARTIAL_SUFFIX)
    with _locked(partial):  # not of a killed run
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise CheckpointError(f"{partial}: is in the way; remove it or give another --output") from error
    with _locked(partial):
        try:
            yield partial
            before_naming()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _give_name(partial, output)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other conversions out of a folder, where it is there and its file system has locks.

    Raises:
        CheckpointError: another one is at work in it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(f"{folder}: another conversion is writing it") from error
        yield
    finally:
        os.close(descriptor)


def _give_name(partial: Path, output: Path) -> None:
    replaced = output.with_name(output.name + _REPLACED_SUFFIX)
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        os.replace(output, replaced)
    os.replace(partial, output)
    shutil.rmtree(replaced, ignore_errors=True)
