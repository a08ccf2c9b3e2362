"""The Slurm jobs of a run: what each stage asks sbatch for.

Names are those of sbatch's long options, with underscores. Invariant: what ``tools/submit.py`` decides by
itself (array, dependency, job name, signal, ...) cannot be given here, so that the chain of jobs holds.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt
from pydantic_core import PydanticCustomError

from megatron_tokedit.config.base import Section

_TIMES = (
    (re.compile(r"(?P<minutes>\d+)(:(?P<seconds>\d\d))?"), "minutes or MM:SS"),
    (re.compile(r"(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d)"), "H:MM:SS"),
    (
        re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d\d)(:(?P<seconds>\d\d))?)?"),
        "D-H, D-H:MM or D-H:MM:SS",
    ),
)
_UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
_FLAG = re.compile(r"(--[A-Za-z][\w-]+)(=.*)?|(-[A-Za-z])(\S.*)?")

_FIELDS = {
    "--partition": "partition",
    "--account": "account",
    "--qos": "qos",
    "--constraint": "constraint",
    "--reservation": "reservation",
    "--nodes": "train.nodes",
    "--gpus": "gpus_per_node",
    "--gpus-per-node": "gpus_per_node (and gres_type)",
    "--gpus-per-task": "gpus_per_node",
    "--cpus-per-task": "cpus_per_task",
    "--cpus-per-gpu": "cpus_per_task",
    "--mem": "mem",
    "--mem-per-cpu": "mem",
    "--mem-per-gpu": "mem",
    "--time": "time",
    "--array": "preprocess.tasks and preprocess.max_running",
    "--signal": "signal, of train or preprocess",
}
"""Flags that have a field of their own."""
_OURS = {
    "--dependency": "submit.py makes the chain",
    "--kill-on-invalid-dep": "submit.py makes the chain",
    "--job-name": "it is the run folder's name and the stage",
    "--output": "it is RUN_DIR/slurm/%x-%j.log",
    "--error": "it goes where the output goes, RUN_DIR/slurm/%x-%j.log",
    "--open-mode": "logs are appended to after a requeue",
    "--requeue": "the scripts queue themselves again",
    "--no-requeue": "the scripts queue themselves again; leave requeuing to them",
    "--ntasks": "the scripts start one task a node",
    "--ntasks-per-node": "the scripts start one task a node",
    "--parsable": "submit.py reads sbatch's answer",
    "--quiet": "submit.py reads sbatch's answer",
    "--wait": "submit.py does not wait for jobs",
    "--test-only": "use submit.py --dry-run",
    "--clusters": "submit.py asks this cluster's squeue for its jobs; submit on the other cluster",
    "--wrap": "submit.py runs the scripts in slurm/",
    "--chdir": "paths in a RUN.yaml start at the folder that submit.py is run in",
    "--export": "the jobs need the environment; set variables in slurm/env.sh",
}
"""Flags that are decided elsewhere, and where."""
_SHORT = {
    "-p": "--partition",
    "-A": "--account",
    "-q": "--qos",
    "-C": "--constraint",
    "-N": "--nodes",
    "-G": "--gpus",
    "-c": "--cpus-per-task",
    "-t": "--time",
    "-a": "--array",
    "-d": "--dependency",
    "-J": "--job-name",
    "-o": "--output",
    "-e": "--error",
    "-n": "--ntasks",
    "-Q": "--quiet",
    "-W": "--wait",
    "-D": "--chdir",
    "-M": "--clusters",
}


def seconds_of(time: str) -> int | None:
    """A time limit as sbatch reads it, in seconds; None where it is not one."""
    for pattern, _ in _TIMES:
        if match := pattern.fullmatch(time.strip()):
            return sum(_UNITS[unit] * int(count or 0) for unit, count in match.groupdict().items())
    return None


def _time(value: object) -> object:
    """Refuse what YAML made of an unquoted time, and what sbatch does not take."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticCustomError(
            "sbatch_time",
            'a time in quotes, such as "4:00:00": quote it, because YAML reads 4:00:00 without quotes as the '
            "number 14400",
        )
    if isinstance(value, str) and not seconds_of(value):
        forms = ", ".join(form for _, form in _TIMES)
        raise PydanticCustomError("sbatch_time", "a time longer than 0 as sbatch takes it: {f}", {"f": forms})
    return value


def _memory(value: object) -> object:
    """A number is megabytes, as for sbatch."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and not _MEMORY.fullmatch(value):
        raise PydanticCustomError(
            "sbatch_memory",
            "memory a node as sbatch takes it: 64G, 1000M, 2T, or 0 for all of the node's",
        )
    return value


def _flag(value: str) -> str:
    """Only a flag, and none that is decided elsewhere.

    Raises:
        PydanticCustomError: another flag or field is to be used, or none.
    """
    match = _FLAG.fullmatch(value)
    if match is None:
        raise PydanticCustomError(
            "sbatch_flag", "one flag of sbatch an entry, in one word, such as --mail-type=FAIL"
        )
    name = match[1] or _SHORT.get(match[3], match[3])
    field = "gpus_per_node (and gres_type)" if name == "--gres" and "gpu" in value else _FIELDS.get(name)
    if field is not None:
        raise PydanticCustomError("sbatch_flag", "the field instead of the flag: {f}", {"f": field})
    if name in _OURS:
        raise PydanticCustomError("sbatch_flag", "no {n}: {why}", {"n": name, "why": _OURS[name]})
    return value


def _word(value: str) -> str:
    """One word of a command line.

    Raises:
        PydanticCustomError: it is empty, has spaces, or would be taken for a flag.
    """
    if not re.fullmatch(r"[^\s-]\S*", value):
        raise PydanticCustomError("sbatch_word", "one word as sbatch takes it")
    return value


Time = Annotated[str, BeforeValidator(_time)]
"""A time limit: minutes, MM:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS. To be quoted in YAML."""
Memory = Annotated[str, BeforeValidator(_memory)]
"""Memory a node: ``64G``, ``1000M``, a number of megabytes, or 0 for all."""
Flag = Annotated[str, AfterValidator(_flag)]
Word = Annotated[str, AfterValidator(_word)]


class Placement(Section):
    """Where jobs may run. What is not given here comes from ``slurm/env.sh`` (``SBATCH_PARTITION`` ...)."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    """Features that the nodes must have."""
    reservation: Word | None = None
    sbatch: list[Flag] = Field(default_factory=list)
    """Any other flags of sbatch, one a list entry: ``--mail-type=FAIL``."""


class StageConfig(Placement):
    """What the jobs of one stage ask for; placement given here goes before that of all stages."""

    cpus_per_task: PositiveInt | None = None
    """Cores a node: the jobs have one task a node."""
    mem: Memory | None = None
    """Memory a node: ``64G``; 0: all of it."""
    time: Time | None = None
    """Time limit in Slurm's format, in quotes: ``"4:00:00"``. Training and preprocessing queue themselves
    again when it is over, and go on."""

    @property
    def seconds(self) -> int | None:
        """The time limit; None: the partition's."""
        return seconds_of(self.time) if self.time is not None else None


class GpuStageConfig(StageConfig):
    """A stage that runs a model."""

    gpus_per_node: PositiveInt | None = None
    """GPUs a node, and as many ranks; without it the stage runs on CPUs."""
    gres_type: Word | None = None
    """Slurm's name of the GPUs (``sinfo -o %G``), where the site wants ``--gpus-per-node=TYPE:N``."""


class ResumingStageConfig(GpuStageConfig):
    """A stage that saves what it has before its time is over, and goes on in the queue."""

    signal: PositiveInt | None = None
    """Seconds before the time limit at which the job is told to save; default: what its script says (300 for
    training, 120 for preprocessing). More where a step and a checkpoint take longer."""


class PreprocessStageConfig(ResumingStageConfig):
    """The array job that makes the datasets; a task is one node."""

    tasks: PositiveInt | None = None
    """Tasks of the array; the work units of all missing sources are dealt to them. Default: one."""
    max_running: PositiveInt | None = None
    """Tasks that may run at a time; default: as many as the cluster lets."""


class TrainStageConfig(ResumingStageConfig):
    """The training job."""

    nodes: PositiveInt | None = None
    gpu_type: str | None = Field(default=None, min_length=1)
    """Text that must occur in the name of every rank's GPU (``h100``); the job stops where it does not."""

    @property
    def world_size(self) -> int | None:
        """Ranks of the job; None where nodes or GPUs are not said."""
        if self.nodes is None or self.gpus_per_node is None:
            return None
        return self.nodes * self.gpus_per_node


class EvaluateStageConfig(GpuStageConfig):
    """The job that measures the trained model."""


class SlurmConfig(Placement):
    """The jobs that ``tools/submit.py`` submits; its own fields are for all stages."""

    preprocess: PreprocessStageConfig = PreprocessStageConfig()
    merge: StageConfig = StageConfig()
    train: TrainStageConfig = TrainStageConfig()
    evaluate: EvaluateStageConfig | None = None
    """Given, even empty (``{}``): the chain ends with an evaluation."""
