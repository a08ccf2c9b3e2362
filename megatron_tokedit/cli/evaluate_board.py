"""An evaluation's numbers in the TensorBoard of the run whose checkpoint was evaluated.

They go into ``RUN_DIR/tensorboard/evaluation``, a folder of their own: TensorBoard follows the newest event
file of a folder only, so a file beside those of a run that still trains would stop its curves from growing.

Invariant: the folder says one number a tag and step, the newest, by rising step, whatever is evaluated again
and in whichever order; an evaluation never fails because its numbers could not be entered here.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_tokedit import log
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import CheckpointError

logger = log.get_logger(__name__)

_READ_AFTER_SECONDS = 3600.0
"""By then a TensorBoard that follows the folder has gone on to the next file."""
_Points = dict[tuple[int, str], tuple[float, float]]
"""(step, tag) -> (value, time in seconds since 1970)."""


def append_to_board(checkpoint: str, values: Mapping[str, float]) -> Path | None:
    """Enter scalars at the step of a checkpoint; a number of the same tag and step is replaced.

    Of several processes rank 0 alone writes. What cannot be written costs a warning.

    Args:
        checkpoint: a step folder, or a run folder (its newest complete checkpoint).
        values: tag -> value.

    Returns:
        The folder of the event files; None where there is no TensorBoard: ``checkpoint`` is of another kind
        or not in a run folder, its run keeps none, or it could not be written.
    """
    folder = checkpoint_folder.find_latest(checkpoint)
    if folder is None or not values or int(os.environ.get("RANK", "0")):
        return None
    run_dir = folder.resolve().parent.parent
    if not (run_dir / "tensorboard").is_dir():
        return None
    board = run_dir / "tensorboard" / "evaluation"
    try:
        step = int(checkpoint_folder.read_json(folder, checkpoint_folder.STATE_FILE)["step"])
        board.mkdir(exist_ok=True)
        with _locked(board):
            _replace(board, {(step, tag): (float(value), time.time()) for tag, value in values.items()})
    except (OSError, CheckpointError, KeyError) as error:
        logger.warning("%s: the numbers could not be entered into TensorBoard: %s", board, error)
        return None
    return board


def _replace(board: Path, new: _Points) -> None:
    """Write a file with all numbers of the folder and the new ones; remove files that nobody reads any more.

    The file begins by declaring everything from step 0 on as outdated, which takes back the earlier ones.
    TensorBoard goes from file to file in the order of their names, which begin with the second of their
    making, so the new one must not share it; and it would stand still if the one that it is at were removed.
    """
    # imported here: they take a second
    from torch.utils.tensorboard import SummaryWriter

    earlier = sorted(board.glob("*tfevents*"))
    points = _read(earlier[-1]) | new if earlier else new
    if earlier and earlier[-1].name.split(".")[3:4] == [f"{int(time.time()):010d}"]:
        time.sleep(1.0)
    writer = SummaryWriter(str(board), purge_step=0)
    for (step, tag), (value, seconds) in sorted(points.items()):
        writer.add_scalar(tag, value, step, walltime=seconds)
    writer.close()
    for path in earlier[:-1]:
        if time.time() - path.stat().st_mtime > _READ_AFTER_SECONDS:
            path.unlink()


def _read(path: Path) -> _Points:
    """All numbers of an event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return {
        (event.step, tag): (event.value, event.wall_time)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }


@contextmanager
def _locked(board: Path) -> Iterator[None]:
    """One writer at a time, where the file system has locks."""
    with open(board / "lock", "a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s: no file locks here (%s); going on without", board, error.strerror)
        yield
