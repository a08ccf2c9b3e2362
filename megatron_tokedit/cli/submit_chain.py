"""Which jobs a run still needs, and what each asks sbatch for.

Invariant: looks at files and changes none. What is done is left out, so the same command after a failure
submits what is missing, and of an array only the tasks that owe work units.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tokedit.cli.evaluate_run import evaluation_file
from megatron_tokedit.cli.train_report import RunProgress, find_progress, known_sources, look_at_units
from megatron_tokedit.config.sections import RunConfig, SourceConfig
from megatron_tokedit.config.slurm import (
    EvaluateStageConfig,
    GpuStageConfig,
    ResumingStageConfig,
    SlurmConfig,
    StageConfig,
    TrainStageConfig,
)
from megatron_tokedit.dataset.sources import all_sources, dataset_exists, missing_sources
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.pipeline.placement import array_expression

STAGES = ("preprocess", "merge", "train", "evaluate")
TRAIN_SCRIPTS = {"pretrain": "pretrain_edited.sh", "continue": "continual_pretrain.sh", "sft": "sft.sh"}
"""By the stage of the run's configuration."""
_PLACEMENT = ("partition", "account", "qos", "constraint", "reservation")


@dataclass(frozen=True, slots=True)
class Job:
    """One call of sbatch.

    Attributes:
        stage: one of :data:`STAGES`.
        script: its name in ``slurm/``.
        arguments: of the script.
        name: of the job.
        log_dir: folder of its log.
        array: of its tasks, as sbatch takes it; None for a single job.
        resource_flags: of sbatch.
        resources: what it asks for, in words.
        after: the stage whose job must have succeeded first.
    """

    stage: str
    script: str
    arguments: tuple[str, ...]
    name: str
    log_dir: Path
    array: str | None
    resource_flags: tuple[str, ...]
    resources: str
    after: str | None

    def command(self, script: str, dependency: str | None) -> list[str]:
        """The words of the command.

        Args:
            script: the path of the script.
            dependency: id of the job that it waits for.
        """
        log = "%x-%A_%a.log" if self.array else "%x-%j.log"
        flags = [f"--job-name={self.name}", f"--output={str(self.log_dir).replace('%', '%%')}/{log}"]
        if self.array:
            flags.append(f"--array={self.array}")
        if dependency:
            flags += [f"--dependency=afterok:{dependency}", "--kill-on-invalid-dep=yes"]
        return ["sbatch", "--parsable", *flags, *self.resource_flags, script, *self.arguments]

    def log_pattern(self, job_id: str) -> str:
        """The job's logs, for a shell."""
        return f"{shlex.quote(str(self.log_dir))}/{self.name}-{job_id}{'_*' if self.array else ''}.log"


@dataclass(frozen=True, slots=True)
class Chain:
    """The jobs that a run still needs, in order.

    Attributes:
        jobs: the first waits for nothing, every other one for the one before.
        found: what is there and what is missing, a line each.
        left_out: stages that are not submitted, and why.
    """

    jobs: tuple[Job, ...]
    found: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Need:
    """What of the datasets has yet to be made.

    Attributes:
        sources: that are missing.
        tasks: array tasks that owe work units, of all ``slurm.preprocess.tasks``.
    """

    sources: list[SourceConfig]
    tasks: list[int]


def plan_chain(config: RunConfig, stages: Collection[str] | None, arguments: Sequence[str]) -> Chain:
    """Decide what to submit.

    Args:
        config: the run's, sound.
        stages: asked for; None: what the run needs.
        arguments: the configuration's path and the overrides, for the scripts.

    Raises:
        ConfigError: a stage was asked for whose input nobody makes.
    """
    progress = find_progress(config)
    config = known_sources(config)
    need = _needed(config)
    found = [f"{config.run_dir}: step {progress.step} of {progress.train_steps or 'its epochs'}"]
    names = [source.name for _, source in all_sources(config.data) if dataset_exists(source.prefix)]
    found += [f"datasets that are there: {', '.join(names)}"] if names else []
    found += [f"dataset that is missing: {source}" for source in progress.missing]
    wanted = [stage for stage in STAGES if stage != "evaluate" or config.slurm.evaluate is not None]
    asked = wanted if stages is None else stages
    done = _done(need)
    if progress.is_complete:
        done |= _done_after_training(config, progress, wanted if stages is None else ())
    chosen = [stage for stage in STAGES if stage in asked and stage not in done]
    _refuse_gaps(config, need, chosen, is_trained=progress.step > 0)
    jobs: list[Job] = []
    for stage in chosen:
        jobs.append(_job(stage, config, need, arguments, jobs[-1].stage if jobs else None))
    reasons = dict.fromkeys(why for stage, why in done.items() if stage in asked)
    left_out = (f"{', '.join(s for s in done if done[s] == why and s in asked)}: {why}" for why in reasons)
    return Chain(tuple(jobs), tuple(found), tuple(left_out))


def _needed(config: RunConfig) -> _Need:
    """The missing sources, and the tasks that owe units of them; all tasks where there is no plan yet."""
    count = config.slurm.preprocess.tasks or 1
    sources = missing_sources(config)
    tasks: set[int] = set()
    for source in sources:
        units = look_at_units(config, source)
        tasks.update(range(count) if units is None else (unit_id % count for unit_id in units.undone))
    return _Need(sources, sorted(tasks))


def _done(need: _Need) -> dict[str, str]:
    """Stages that have nothing left to do, and why."""
    if not need.sources:
        return dict.fromkeys(("preprocess", "merge"), "all datasets are there")
    return {} if need.tasks else {"preprocess": "all work units are done"}


def _done_after_training(config: RunConfig, progress: RunProgress, wanted: Sequence[str]) -> dict[str, str]:
    """The same of a run that is complete: nothing is made or measured once more, unless asked for by name.

    Args:
        config: the run's, with the prefixes that are known.
        progress: of it.
        wanted: stages that nobody has asked for by name.
    """
    step = progress.step
    why = f"the run is complete: step {step} of {progress.train_steps}"
    done = {"train": why}
    evaluated = evaluation_file(config.run_dir, step)
    if "evaluate" in wanted and evaluated.exists():
        done["evaluate"] = f"{evaluated} is there"
    needs_data = "evaluate" in wanted and "evaluate" not in done
    if wanted and not (needs_data and any(not dataset_exists(s.prefix) for s in config.data.validation)):
        done |= {"preprocess": why, "merge": why}
    return done


def _refuse_gaps(config: RunConfig, need: _Need, chosen: Sequence[str], *, is_trained: bool) -> None:
    """Refuse a chain one of whose jobs would find nothing to work on.

    Raises:
        ConfigError: lists them.
    """
    faults = []
    if "merge" in chosen and need.tasks and "preprocess" not in chosen:
        faults.append("merge: work units are not done yet; add preprocess to --stages")
    if "evaluate" in chosen and "train" not in chosen:
        if not is_trained:
            faults.append(f"evaluate: {config.run_dir} has no checkpoint yet; add train to --stages")
        missing = [source.name for source in config.data.validation if not dataset_exists(source.prefix)]
        if missing and "merge" not in chosen:
            faults.append(
                f"evaluate: no dataset of {', '.join(missing)}; add preprocess and merge to --stages"
            )
    if faults:
        raise ConfigError("\n  - ".join(["these jobs would find nothing to work on:", *faults]))


# ------------------------------------------------------------------------------------------------------ a job


def _job(stage: str, config: RunConfig, need: _Need, arguments: Sequence[str], after: str | None) -> Job:
    slurm = config.slurm
    wanted = _stage_config(stage, slurm)
    array = array_expression(need.tasks, slurm.preprocess.max_running) if stage == "preprocess" else None
    nodes = wanted.nodes if isinstance(wanted, TrainStageConfig) else 1
    run_name = re.sub(r"[^\w.-]", "_", Path(config.run_dir).absolute().name)
    script = {
        "train": TRAIN_SCRIPTS[config.stage],
        "evaluate": "evaluate.sh",
    }.get(stage, "preprocess_edit.sh")
    tasks = f"tasks {array} of {slurm.preprocess.tasks or 1}, each " if array else ""
    return Job(
        stage=stage,
        script=script,
        arguments=("--merge", *arguments) if stage == "merge" else tuple(arguments),
        name=f"{run_name}-{stage}",
        log_dir=log_folder(config),
        array=array,
        resource_flags=tuple(_resource_flags(wanted, slurm, nodes)),
        resources=tasks + ", ".join(_resources_in_words(wanted, nodes)),
        after=after,
    )


def log_folder(config: RunConfig) -> Path:
    """Where the jobs' logs are, and the list of what was submitted."""
    return Path(config.run_dir) / "slurm"


def _stage_config(stage: str, slurm: SlurmConfig) -> StageConfig:
    if stage == "evaluate":
        return slurm.evaluate or EvaluateStageConfig()
    return {"preprocess": slurm.preprocess, "merge": slurm.merge, "train": slurm.train}[stage]


def _resource_flags(stage: StageConfig, slurm: SlurmConfig, nodes: int | None) -> Iterator[str]:
    """The settings under their names; a stage's own go before those of all stages."""
    if nodes:
        yield f"--nodes={nodes}"
    for name in _PLACEMENT:
        if value := getattr(stage, name) or getattr(slurm, name):
            yield f"--{name}={value}"
    if isinstance(stage, GpuStageConfig) and stage.gpus_per_node:
        kind = f"{stage.gres_type}:" if stage.gres_type else ""
        yield f"--gpus-per-node={kind}{stage.gpus_per_node}"
    for name in ("cpus_per_task", "mem", "time"):
        if (value := getattr(stage, name)) is not None:
            yield f"--{name.replace('_', '-')}={value}"
    if isinstance(stage, ResumingStageConfig) and stage.signal is not None:
        yield f"--signal=B:USR1@{stage.signal}"
    yield from (*slurm.sbatch, *stage.sbatch)


def _resources_in_words(stage: StageConfig, nodes: int | None) -> Iterator[str]:
    yield f"{nodes} node{'s' * (nodes > 1)}" if nodes else "nodes as the script says"
    if isinstance(stage, GpuStageConfig) and stage.gpus_per_node:
        yield f"{stage.gpus_per_node} GPU{'s' * (stage.gpus_per_node > 1)} a node"
    if stage.cpus_per_task:
        yield f"{stage.cpus_per_task} CPU{'s' * (stage.cpus_per_task > 1)} a node"
    if stage.mem:
        yield "all memory" if stage.mem == "0" else stage.mem
    if stage.time:
        yield f"time {stage.time}"
