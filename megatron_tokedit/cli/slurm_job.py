"""``tools/slurm_job.py``: what a batch script asks at a job's start, and after a step that failed.

    RUN_DIR/slurm/4711/starts.jsonl       the ledger: a line for every start of job 4711
    RUN_DIR/slurm/4711/restart-2/         the logs of its third start

The scripts ``eval`` what it prints: nothing but shell assignments goes to stdout. Invariant: a job that was
started three times and saw the same step and the same number of finished work units each time does not start.
No torch: a job must not wait for it in order to hear that it has nothing to do.
"""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_tokedit.cli.main import EXIT_OK, add_common_arguments, run_command
from megatron_tokedit.cli.train_report import (
    REQUEUE_FILE,
    RunProgress,
    count_made_units,
    find_progress,
)
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.config.slurm import GpuStageConfig
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import CheckpointError, ConfigError, TokeditError
from megatron_tokedit.log import get_logger
from megatron_tokedit.pipeline.placement import WHOLE, Share, array_share

logger = get_logger(__name__)

STAGES = ("preprocess", "merge", "train", "evaluate")
LEDGER = "starts.jsonl"
_STARTS_WITHOUT_PROGRESS = 3

_DESCRIPTION = """\
For the scripts in slurm/, inside a job: where its run is. `begin` checks that the job fits the configuration,
records the start, and refuses one that follows two starts without progress; it prints run_dir, log_dir,
missing_sources, complete (1: training is done), progress, run_stage and gpu_type as shell assignments. `end`,
after a step that failed, prints continue (1: it stopped in order and is to be queued again) and progress."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="slurm_job.py", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("begin", "end"), help="at the start, or after a step that failed")
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--config", required=True, metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="as for tools/train.py")
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_intermixed_args(argv)
    job = JobStart.from_environment(os.environ)
    config = load_config(arguments.config, arguments.overrides, world_size=_world_size(arguments.stage))
    action = _begin if arguments.action == "begin" else _end
    for name, value in action(config, arguments.stage, job).items():
        print(f"{name}={shlex.quote(str(value))}")
    return EXIT_OK


@dataclass(frozen=True, slots=True)
class JobStart:
    """One start of a job.

    Attributes:
        name: its number, or ``ARRAY_TASK``.
        restart: how often it was started before.
        is_array_task: one of an array.
    """

    name: str
    restart: int
    is_array_task: bool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> JobStart:
        """As Slurm says.

        Raises:
            ConfigError: there is no job.
        """
        if "SLURM_JOB_ID" not in environment:
            raise ConfigError(
                "not inside a Slurm job (SLURM_JOB_ID is not set): the scripts in slurm/ call this; submit "
                "one with sbatch or tools/submit.py, or use tools/train.py directly"
            )
        is_task = "SLURM_ARRAY_TASK_ID" in environment
        name = environment["SLURM_JOB_ID"]
        if is_task:
            name = f"{environment.get('SLURM_ARRAY_JOB_ID', name)}_{environment['SLURM_ARRAY_TASK_ID']}"
        return cls(name, _number(environment, "SLURM_RESTART_COUNT") or 0, is_task)

    def folder(self, config: RunConfig) -> Path:
        """Of all starts of the job."""
        return Path(os.path.abspath(config.run_dir)) / "slurm" / self.name

    def log_dir(self, config: RunConfig, restart: int | None = None) -> Path:
        """Of this start, or of another one."""
        return self.folder(config) / f"restart-{self.restart if restart is None else restart}"


def _world_size(stage: str) -> int | None:
    """Ranks that the configuration has to fit, as far as the scripts say."""
    return _number(os.environ, "TOKEDIT_EXPECTED_WORLD_SIZE") if stage == "train" else None


def _share(config: RunConfig, stage: str) -> Share:
    """What this job does of the work units."""
    found = array_share(os.environ, config.slurm.preprocess.tasks) if stage == "preprocess" else None
    return found or WHOLE


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is not None and not value.isdecimal():
        raise ConfigError(f"environment variable {name}={value!r}: expected a whole number")
    return None if value is None else int(value)


# --------------------------------------------------------------------------------------------- begin


def _begin(config: RunConfig, stage: str, job: JobStart) -> dict[str, object]:
    """Check, record, and say where the run is."""
    share = _share(config, stage)
    refuse_misfit(config, stage, os.environ)
    progress = find_progress(config, share)
    units = progress.units + count_made_units(config, share)
    if stage == "train" and progress.step == 0:
        _refuse_missing_origin(config)
    log_dir = job.log_dir(config)
    stopped_by = _note_of_last_stop(config, job)
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        starts = _record(job.folder(config) / LEDGER, stage, job.restart, progress.step, units)
        if stage != "evaluate" and not job.is_array_task:  # it is of an earlier start
            (Path(config.run_dir) / REQUEUE_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir: {error.filename} cannot be written: {error.strerror}") from error
    _say_restart(config, job, starts, progress, share)
    if _has_progress_to_make(stage, progress):
        _refuse_standstill(config, job, starts, progress, stopped_by)
    return {
        "run_dir": os.path.abspath(config.run_dir),
        "log_dir": log_dir,
        "missing_sources": len(progress.missing),
        "complete": int(progress.is_complete),
        "progress": progress,
        "run_stage": config.stage,
        "gpu_type": config.slurm.train.gpu_type or "" if stage == "train" else "",
    }


def refuse_misfit(config: RunConfig, stage: str, environment: Mapping[str, str]) -> None:
    """Refuse a job that has other nodes or GPUs than the configuration says; what it leaves open goes.

    Raises:
        ConfigError: with all that does not fit.
    """
    asked = getattr(config.slurm, stage)
    faults = []
    # a step of one node may say one for the job's, too
    nodes = _number(environment, "TOKEDIT_EXPECTED_NODES") or _number(environment, "SLURM_JOB_NUM_NODES") or 1
    wanted = {"train": config.slurm.train.nodes, "preprocess": None}.get(stage, 1)
    if wanted is not None and nodes != wanted:
        says = "slurm.train.nodes" if stage == "train" else f"stage {stage}"
        mend = f"submit with --nodes={wanted}" + (
            f" or give slurm.train.nodes={nodes}" if stage == "train" else ""
        )
        faults.append(f"{says}: the job has {nodes} node(s), expected {wanted}; {mend}")
    if isinstance(asked, GpuStageConfig) and asked.gpus_per_node is not None:
        gpus = _number(environment, "SLURM_GPUS_ON_NODE") or 0
        if gpus != asked.gpus_per_node:
            faults.append(
                f"slurm.{stage}.gpus_per_node: the job has {gpus} GPU(s) on this node, expected "
                f"{asked.gpus_per_node}; submit with --gpus-per-node={asked.gpus_per_node} or give "
                f"slurm.{stage}.gpus_per_node={gpus or 'null'}"
            )
    if faults:
        raise ConfigError("\n  - ".join(["the job does not fit the configuration:", *faults]))


def _refuse_missing_origin(config: RunConfig) -> None:
    """Refuse a continuation whose weights are not there.

    Raises:
        ConfigError: they are not.
    """
    if config.init_from is None:
        return
    try:
        checkpoint_folder.require(config.init_from.checkpoint)
    except CheckpointError as error:
        raise ConfigError(f"init_from.checkpoint: {error}") from error


def _record(ledger: Path, stage: str, restart: int, step: int, units: int) -> list[dict[str, Any]]:
    """Add this start to the ledger; returns all of it."""
    entry = {"restart": restart, "stage": stage, "step": step, "units": units, "time": round(time.time())}
    _append(ledger, entry)
    return read_ledger(ledger)


def _append(ledger: Path, entry: Mapping[str, Any]) -> None:
    """A line of its own, whatever a job that was killed while it wrote has left."""
    with open(ledger, "ab+") as file:
        torn = b""
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + orjson.dumps(entry) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_ledger(ledger: Path) -> list[dict[str, Any]]:
    """The starts in a ledger; lines that are not whole are left out."""
    entries = []
    for line in ledger.read_bytes().splitlines():
        try:
            entry = orjson.loads(line)
            entries.append({**entry, "restart": int(entry["restart"]), "time": float(entry["time"])})
        except (ValueError, TypeError, KeyError):
            continue
    return entries


def _say_restart(
    config: RunConfig,
    job: JobStart,
    starts: Sequence[dict[str, Any]],
    progress: RunProgress,
    share: Share | None,
) -> None:
    """One line at a restart: from where it goes on, and how long the start before lasted."""
    before = [entry for entry in starts if entry["restart"] < job.restart]
    if not job.restart or not before:
        return
    last = before[-1]
    files = [path.stat().st_mtime for path in job.log_dir(config, last["restart"]).glob("*")]
    seconds = max(files, default=0.0) - last["time"]
    lasted = f"lasted {_duration(seconds)}, by its logs" if seconds > 0 else "left no log"
    whose = f"share {share}: " if share != WHOLE else ""
    logger.info("restart %d goes on from %s%s; the start before %s", job.restart, whose, progress, lasted)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _has_progress_to_make(stage: str, progress: RunProgress) -> bool:
    """Whether a start of this stage moves what the ledger holds."""
    return not progress.is_complete if stage == "train" else bool(progress.missing) and stage != "evaluate"


def _refuse_standstill(
    config: RunConfig, job: JobStart, starts: Sequence[dict[str, Any]], progress: RunProgress, stopped_by: str
) -> None:
    """Refuse a start after two that changed nothing; one that is asked for after that is let in again.

    Raises:
        TokeditError: the two starts before saw what this one sees.
    """
    by_restart: dict[int, dict[str, Any]] = {}
    for entry in starts:
        if entry.get("stopped"):
            by_restart.clear()
        elif entry["restart"] <= job.restart:
            by_restart[entry["restart"]] = entry
    latest = list(by_restart.values())[-_STARTS_WITHOUT_PROGRESS:]
    seen = {(entry.get("step"), entry.get("units")) for entry in latest}
    if len(latest) < _STARTS_WITHOUT_PROGRESS or len(seen) > 1:
        return
    first, second = (_start_in_words(entry["restart"]) for entry in latest[:2])
    _append(
        job.folder(config) / LEDGER, {"restart": job.restart, "stopped": True, "time": round(time.time())}
    )
    hint = ""
    if "SIGUSR1" in stopped_by:
        hint = (
            f" ({second} was stopped by {stopped_by}: where that is the notice of the time limit, --time has "
            f"to be longer than the notice, --signal, and the start-up together)"
        )
    raise TokeditError(
        f"stopped: {first} and {second} of job {job.name} made no progress ({progress}, as when {first} "
        f"began); see {job.log_dir(config, latest[1]['restart'])}; mend the cause and submit again{hint}"
    )


def _note_of_last_stop(config: RunConfig, job: JobStart) -> str:
    """What stopped the start before in order; empty: nothing did."""
    notes = [job.log_dir(config, job.restart - 1) / REQUEUE_FILE]
    if not job.is_array_task:
        notes.append(Path(config.run_dir) / REQUEUE_FILE)
    with suppress(OSError):
        return next((path.read_text(encoding="utf-8").strip() for path in notes if path.exists()), "")
    return ""


def _start_in_words(restart: int) -> str:
    return f"restart {restart}" if restart else "the first start"


# ----------------------------------------------------------------------------------------------- end


def _end(config: RunConfig, stage: str, job: JobStart) -> dict[str, object]:
    """Whether the ranks stopped in order."""
    share = _share(config, stage)
    notes = [job.log_dir(config) / REQUEUE_FILE]
    if not job.is_array_task:
        notes.append(Path(config.run_dir) / REQUEUE_FILE)
    note = next((path for path in notes if path.exists()), None)
    progress = str(find_progress(config, share))
    if note is not None:
        progress += f"; stopped by {note.read_text(encoding='utf-8').strip()}, to be continued"
    return {"continue": int(note is not None), "progress": progress}
