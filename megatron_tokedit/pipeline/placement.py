"""Which share of a job, and of this machine's cores, this process takes, as its launcher says it.

Invariant: rank and world size come from one source, never half from one and half from another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_tokedit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Share:
    """One of several jobs that divide the work units among them, whatever the number of ranks of each.

    Invariant: a unit belongs to the same share however many ranks a share has, so that a share may run again
    on another kind of node, and a missing unit names the share that owes it.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        """Refuse a share that is none.

        Raises:
            ConfigError: the index is not below the count.
        """
        if not 0 <= self.index < self.count:
            raise ConfigError(f"share {self}: expected I/N with I from 0 to N - 1")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def placement(self, rank: int, world_size: int) -> tuple[int, int]:
        """Rank and world size over all shares of one of this share's ranks."""
        return self.index + self.count * rank, self.count * world_size

    def has(self, unit_id: int) -> bool:
        """Whether a unit belongs to this share."""
        return unit_id % self.count == self.index


WHOLE = Share(0, 1)
"""All units."""


def array_share(environment: Mapping[str, str], tasks: int | None) -> Share | None:
    """The share of a task of a Slurm array; None outside one.

    Args:
        environment: of the process.
        tasks: number of shares, ``slurm.preprocess.tasks``; None: the array's size.

    Raises:
        ConfigError: the task is none of the shares, or the number of shares cannot be known.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    index = _number(environment, "SLURM_ARRAY_TASK_ID")
    if tasks is not None:
        if not 0 <= index < tasks:
            raise ConfigError(
                f"array task {index}: slurm.preprocess.tasks is {tasks}, so the tasks are 0 to {tasks - 1}; "
                f"submit with --array=0-{tasks - 1} (to run failed tasks again, with their numbers alone)"
            )
        return Share(index, tasks)
    count = _number(environment, "SLURM_ARRAY_TASK_COUNT")
    first = _number(environment, "SLURM_ARRAY_TASK_MIN", "0")
    last = _number(environment, "SLURM_ARRAY_TASK_MAX", str(max(index, count - 1)))
    if first != 0 or last != count - 1:
        raise ConfigError(
            f"array task {index}: an array of {count} task(s) from {first} to {last} does not say how many "
            f"shares there are in all; set slurm.preprocess.tasks to the size of the whole array, or submit "
            f"the whole of it with --array=0-{max(count - 1, last)}"
        )
    return Share(index, count)


def array_expression(tasks: Sequence[int], max_running: int | None = None) -> str:
    """The ``0-15%8`` or ``3,7%8`` that sbatch takes, for rising numbers of tasks."""
    ranges: list[list[int]] = []
    for task in tasks:
        if ranges and ranges[-1][1] == task - 1:
            ranges[-1][1] = task
        else:
            ranges.append([task, task])
    text = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)
    return f"{text}%{max_running}" if max_running else text


def placement(
    environment: Mapping[str, str], rank: int | None = None, world_size: int | None = None
) -> tuple[int, int]:
    """Rank and world size: as given, else from torchrun, else from a Slurm array, else 0 of 1.

    Args:
        environment: of the process.
        rank: ``--rank``; needs ``world_size``.
        world_size: ``--world-size``; needs ``rank``.

    Raises:
        ConfigError: only one of the two is given, they do not fit each other, or a launcher's variable is not
            a number.
    """
    if (rank is None) != (world_size is None):
        raise ConfigError("--rank and --world-size: give both or none")
    if rank is None or world_size is None:
        rank, world_size = _from_launcher(environment)
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size}: expected a rank from 0 to world size - 1")
    return rank, world_size


def usable_cores(environment: Mapping[str, str]) -> int:
    """Cores for this process: those it is allowed, divided among torchrun's processes on this node.

    Allowed is what its affinity, its control group's quota (as containers set it) and, in a step of a Slurm
    job, ``SLURM_CPUS_ON_NODE`` say: a Slurm without a task plugin gives a job cores and binds nothing.

    Args:
        environment: of the process.

    Raises:
        ConfigError: a launcher's variable is not a number.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _control_group_number("cpu.max")
    if quota is not None:
        allowed = min(allowed, max(1, quota[0] // quota[1]))
    if "SLURM_STEP_ID" in environment:
        allowed = min(allowed, max(1, _number(environment, "SLURM_CPUS_ON_NODE", str(allowed))))
    return max(1, allowed // max(1, _number(environment, "LOCAL_WORLD_SIZE", "1")))


def usable_bytes() -> int:
    """Memory that is free for this process: of the machine, and of its control group where that has less."""
    available = psutil.virtual_memory().available
    limit, used = _control_group_number("memory.max"), _control_group_number("memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit[0] - used[0]))
    return int(available)


def _control_group_number(name: str) -> tuple[int, ...] | None:
    """The numbers in a file of this process's (version 2) control group; None where there is no limit."""
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        words = Path(f"/sys/fs/cgroup{group}/{name}").read_text().split()
        return tuple(map(int, words))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _from_launcher(environment: Mapping[str, str]) -> tuple[int, int]:
    """What torchrun or a Slurm array says."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if "SLURM_ARRAY_TASK_ID" in environment:
        step = _number(environment, "SLURM_ARRAY_TASK_STEP", "1")
        index = _number(environment, "SLURM_ARRAY_TASK_ID") - _number(
            environment, "SLURM_ARRAY_TASK_MIN", "0"
        )
        return index // step, _number(environment, "SLURM_ARRAY_TASK_COUNT")
    return 0, 1


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    """A launcher's variable as an integer."""
    value = environment.get(name, default)
    if value is None or not value.lstrip("-").isdecimal():
        raise ConfigError(f"environment variable {name}={value!r}: expected a whole number")
    return int(value)
