"""The folder of a checkpoint, apart from what is in it: names, the newest complete one, JSON files.

    RUN_DIR/checkpoints/step_00000100/   megatron-core's torch_dist files (model, optimizer, random states)
                                         run_config.json, state.json
                                         COMPLETE.json, written last: every file and its size
    RUN_DIR/checkpoints/latest           name of the newest complete folder, replaced atomically

Invariant: a folder counts only if its marker is there and every file it lists has its size. Nothing here
imports torch, so asking how far a run is costs nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import orjson

from megatron_tokedit.errors import CheckpointError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

MARKER = "COMPLETE.json"
STATE_FILE = "state.json"
RUN_CONFIG_FILE = "run_config.json"
LATEST = "latest"
PARTIAL_SUFFIX = ".partial"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


def step_folder(checkpoints_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint of ``step``."""
    return Path(checkpoints_dir) / f"step_{step:08d}"


def is_complete(folder: str | Path) -> bool:
    """Whether the folder is a whole checkpoint: its marker, and every listed file at its size."""
    folder = Path(folder)
    try:
        files = orjson.loads((folder / MARKER).read_bytes())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, orjson.JSONDecodeError, KeyError):
        return False


def complete_steps(checkpoints_dir: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints by rising step."""
    if not checkpoints_dir.is_dir():
        return []
    matches = ((_STEP_FOLDER.fullmatch(entry.name), entry) for entry in checkpoints_dir.iterdir())
    found = [(int(match.group(1)), entry) for match, entry in matches if match and is_complete(entry)]
    return sorted(found)


def find_latest(path: str | Path) -> Path | None:
    """The newest complete checkpoint of a run.

    Args:
        path: a step folder, a run folder, or a run's ``checkpoints`` folder.

    Returns:
        The step folder, or None where there is no complete one.
    """
    path = Path(path)
    if is_complete(path):
        return path
    for checkpoints_dir in (path / "checkpoints", path):
        if steps := complete_steps(checkpoints_dir):
            return steps[-1][1]
    return None


def require(path: str | Path) -> Path:
    """As :func:`find_latest`.

    Raises:
        CheckpointError: nothing complete is there.
    """
    found = find_latest(path)
    if found is None:
        what = "has no complete checkpoint" if Path(path).exists() else "does not exist"
        raise CheckpointError(
            f"{path}: {what}; give a run folder, its 'checkpoints' folder or a step_* folder "
            f"that holds {MARKER}"
        )
    return found


def read_json(folder: str | Path, name: str) -> dict[str, Any]:
    """Read ``state.json`` or ``run_config.json`` of a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = Path(folder) / name
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); the checkpoint is damaged") from error
    return dict(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write by rename: a reader sees the old content or the new one."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with open(partial, "wb") as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def finish(partial: Path, folder: Path, state: dict[str, Any], run_config: dict[str, Any]) -> None:
    """Turn a folder in which all shards are written into a checkpoint: JSON files, marker, name, ``latest``.

    Raises:
        CheckpointError: what was written cannot be read as a whole.
    """
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


def prune(checkpoints_dir: Path, keep_last: int, keep_every_steps: int) -> None:
    """Keep the newest ``keep_last`` complete checkpoints (0: all) and those of every ``keep_every_steps``."""
    if not keep_last:
        return
    for step, old in complete_steps(checkpoints_dir)[:-keep_last]:
        if not keep_every_steps or step % keep_every_steps:
            try:
                _remove(old)
            except OSError as error:  # such as a file that somebody has open on a network file system
                logger.warning("%s: could not be removed: %s", old, error.strerror or error)


def remove_partial(checkpoints_dir: Path) -> None:
    """Clear away what interrupted saves left."""
    for leftover in checkpoints_dir.glob(f"step_*{PARTIAL_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)  # first, so that a half-removed folder never looks whole
    shutil.rmtree(folder)
