"""Slurm's programs as ``tools/submit.py`` uses them, and its record of what was submitted.

Invariant: a job that sbatch took is in the record before the next one is submitted, so that no job is lost
sight of, however the command ends. All programs run after the site's ``slurm/env.sh``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_tokedit.errors import ConfigError, TokeditError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

_WITH_SITE = 'source "$0" >&2; exec "$@"'
"""What ``slurm/env.sh`` prints must not be taken for a job's id."""
_PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol")
_RECORDS_ASKED_FOR = 200


class SubmissionError(TokeditError):
    """Slurm is not there, or refuses."""


def project_root() -> Path:
    """The project's folder: ``TOKEDIT_ROOT``, else the one that this package lies in.

    Raises:
        ConfigError: there are no Slurm scripts.
    """
    root = Path(os.environ.get("TOKEDIT_ROOT") or Path(__file__).resolve().parents[2])
    if not (root / "slurm" / "env.sh").is_file():
        raise ConfigError(
            f"{root} has no slurm/env.sh: run tools/submit.py of a checkout of the project, or set "
            f"TOKEDIT_ROOT to one"
        )
    return root


def shown_path(path: Path) -> str:
    """A path as one would type it: relative where it lies below the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _outside_of_a_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a job that submits leaves in it: its jobs would take it for their own."""
    if "SLURM_JOB_ID" not in environment:
        return dict(environment)
    of_a_job = ("SLURM_", "SLURMD_", "SRUN_", "RANKS_PER_NODE", "TOKEDIT_EXPECTED_", "TOKEDIT_LOG_DIR")
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value for name, value in environment.items() if name in kept or not name.startswith(of_a_job)
    }


@dataclass(frozen=True, slots=True)
class Slurm:
    """The cluster that this machine submits to.

    Attributes:
        env_file: the site's ``slurm/env.sh``.
    """

    env_file: Path

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a program with the site's variables."""
        return subprocess.run(
            ["bash", "-c", _WITH_SITE, str(self.env_file), *command],
            env=_outside_of_a_job(os.environ),
            text=True,
            capture_output=True,
            check=False,
        )

    def require(self) -> None:
        """Look for Slurm's programs.

        Raises:
            SubmissionError: one is not there.
        """
        look = 'for name in "$@"; do command -v "$name" >/dev/null || echo "$name"; done'
        missing = self.run(["bash", "-c", look, "look", *_PROGRAMS]).stdout.split()
        if missing:
            raise SubmissionError(
                f"{', '.join(missing)}: not on this machine. Submit on a login node of a Slurm cluster; "
                f"where a module brings Slurm's programs, load it in {shown_path(self.env_file)}. --dry-run "
                f"needs no Slurm"
            )

    def submit(self, command: Sequence[str]) -> str:
        """Run an sbatch command; returns the job's id.

        Raises:
            SubmissionError: it was refused.
        """
        done = self.run(command)
        words = done.stdout.split()
        job_id = words[-1].partition(";")[0] if words else ""
        if done.returncode == 0 and job_id.isdecimal():
            return job_id
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}")[-2000:]
        raise SubmissionError(reason)

    def active(self, jobs: Mapping[str, str]) -> dict[str, list[str]]:
        """Those of the jobs that are queued or running: id -> ``4711_[3-15] PENDING``, ...

        Args:
            jobs: id -> name; a job of another name is another one, that has got the id since.

        Raises:
            SubmissionError: squeue does not answer.
        """
        if not jobs:
            return {}
        asked = ",".join(jobs)
        done = self.run(["squeue", "--noheader", "--format=%F %j %i %T", f"--jobs={asked}"])
        if done.returncode and "Invalid job id" not in done.stderr:  # what it says of one that is long gone
            raise SubmissionError(
                f"squeue does not say whether jobs of this run are queued: {done.stderr.strip()}; --force "
                f"submits all the same"
            )
        found: dict[str, list[str]] = {}
        for line in filter(str.strip, done.stdout.splitlines()):
            job_id, name, state = line.split(maxsplit=2)
            if jobs.get(job_id) == name:
                found.setdefault(job_id, []).append(state)
        return {job_id: found[job_id] for job_id in jobs if job_id in found}

    def max_array_size(self) -> int | None:
        """The cluster's ``MaxArraySize``: an array's task numbers are below it. None where it is not said."""
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", self.run(["scontrol", "show", "config"]).stdout, re.M)
        return int(match[1]) if match else None

    def cancel(self, job_ids: Sequence[str]) -> str:
        """Cancel jobs; returns what went wrong, empty for nothing."""
        done = self.run(["scancel", *job_ids])
        return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""


class Record:
    """``RUN_DIR/slurm/submitted.jsonl``: a line for every job that sbatch took."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "submitted.jsonl"

    def add(self, **fields: Any) -> None:
        """Append a line."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **fields})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def jobs(self) -> dict[str, str]:
        """Id -> name of the newest jobs in it, oldest first, without those that were cancelled at once."""
        jobs: dict[str, str] = {}
        for entry in self._entries():
            for job_id in entry.get("cancelled", ()):
                jobs.pop(job_id, None)
            if "job_id" in entry:
                jobs[entry["job_id"]] = entry.get("name", "")
        return dict(list(jobs.items())[-_RECORDS_ASKED_FOR:])

    def _entries(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                yield entry
            else:
                logger.warning("%s: line %d is damaged and left out", self.path, number)
