"""``tools/submit.py``: a run's chain of Slurm jobs, from its one YAML file.

Invariant: nothing is submitted before everything that can be known here was checked, and where sbatch refuses
a job none of the chain stays in the queue.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_tokedit.cli.main import add_common_arguments, run_command
from megatron_tokedit.cli.submit_chain import STAGES, Chain, Job, log_folder, plan_chain
from megatron_tokedit.cli.submit_checks import submission_faults
from megatron_tokedit.cli.submit_slurm import Record, Slurm, SubmissionError, project_root, shown_path
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.pipeline.workdir import make_folder

_SHARED_SCRIPTS = ("env.sh", "lib.sh", "node.sh")

_DESCRIPTION = """\
Submit what a run still needs to Slurm as its YAML file says (section `slurm`), one job after the other:

  preprocess   an array job: the work units of the sources whose dataset is missing (slurm/preprocess_edit.sh)
  merge        joins them to the datasets (slurm/preprocess_edit.sh --merge)
  train        slurm/pretrain_edited.sh; for `stage: continue` continual_pretrain.sh, for `stage: sft` sft.sh
  evaluate     perplexity on the validation sources (slurm/evaluate.sh), where `slurm.evaluate` is given

What is done is left out: after a failure the same command submits what is missing, and of the array only the
tasks that have work units left. The jobs and their exact commands are recorded in
RUN_DIR/slurm/submitted.jsonl. If sbatch refuses one, those submitted before it are cancelled."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="submit.py", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="replaces a setting, here and in the jobs: slurm.train.nodes=4",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the exact commands and scripts; needs no Slurm and changes nothing",
    )
    parser.add_argument(
        "--stages",
        metavar="STAGE,...",
        help=f"only these of {','.join(STAGES)} (default: what the run needs)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="submit though jobs of an earlier submission of this run are queued or running",
    )
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> None:
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    stages = arguments.stages.split(",") if arguments.stages is not None else None
    if stages is not None and (unknown := [stage for stage in stages if stage not in STAGES]):
        parser.error(f"--stages: {unknown[0]!r} is none of {', '.join(STAGES)}")
    config = load_config(
        arguments.config,
        arguments.overrides,
        machine_faults=partial(submission_faults, stages=STAGES[:3] if stages is None else stages),
    )
    chain = plan_chain(config, stages, [arguments.config, *arguments.overrides])
    root = project_root()
    _require_scripts(root, chain)
    for line in chain.found:
        print(line)
    for line in chain.left_out:
        print(f"left out: {line}")
    if not chain.jobs:
        print("nothing to submit")
    elif arguments.dry_run:
        for line in _dry_run(config, chain, root):
            print(line)
    else:
        _submit(config, chain, root, force=arguments.force)


def _require_scripts(root: Path, chain: Chain) -> None:
    missing = sorted({job.script for job in chain.jobs if not (root / "slurm" / job.script).is_file()})
    if missing:
        raise ConfigError(f"{root / 'slurm'} has no {', '.join(missing)}: the checkout is not complete")


# ---------------------------------------------------------------------------------------------------- dry run


def _dry_run(config: RunConfig, chain: Chain, root: Path) -> Iterator[str]:
    """Every command as it could be typed, then every script."""
    folder = root / "slurm"
    yield f"\n# the commands, to be typed in {Path.cwd()}"
    yield shlex.join(["source", shown_path(folder / "env.sh")])
    yield shlex.join(["mkdir", "-p", str(log_folder(config))])
    for job in chain.jobs:
        waits_for = f"${_variable(job.after)}" if job.after else None
        words = job.command(shown_path(folder / job.script), waits_for)
        typed = " ".join(word if waits_for and waits_for in word else shlex.quote(word) for word in words)
        yield f"{_variable(job.stage)}=$({typed})"
    names = dict.fromkeys((*_SHARED_SCRIPTS, *(job.script for job in chain.jobs)))
    for path in (folder / name for name in names):
        if path.is_file():
            yield f"\n# {'-' * 20} {shown_path(path)} {'-' * 20}"
            yield path.read_text(encoding="utf-8").rstrip("\n")


def _variable(stage: str) -> str:
    """The shell variable of a stage's job id."""
    return f"{stage.upper()}_JOB"


# ----------------------------------------------------------------------------------------------------- submit


def _submit(config: RunConfig, chain: Chain, root: Path, *, force: bool) -> None:
    """Submit the jobs one after the other, and print them.

    Raises:
        SubmissionError: Slurm is not there, jobs of this run are in the queue, or sbatch refuses one.
    """
    slurm = Slurm(root / "slurm" / "env.sh")
    slurm.require()
    record = Record(log_folder(config))
    if not force:
        _refuse_active(slurm, record)
    _check_array(slurm, config, chain)
    make_folder(log_folder(config))
    job_ids: dict[str, str] = {}
    for job in chain.jobs:
        dependency = job_ids[job.after] if job.after else None
        command = job.command(shown_path(root / "slurm" / job.script), dependency)
        try:
            job_ids[job.stage] = slurm.submit(command)
        except SubmissionError as error:
            raise _refused(slurm, record, job, command, error, list(job_ids.values())) from None
        record.add(
            stage=job.stage, job_id=job_ids[job.stage], name=job.name, after=dependency, command=command
        )
    for line in (*_table(chain, job_ids), "", *_hints(chain, job_ids)):
        print(line)


def _refuse_active(slurm: Slurm, record: Record) -> None:
    jobs = record.jobs()
    if active := slurm.active(jobs):
        shown = "; ".join(f"{jobs[job_id]}: {', '.join(states)}" for job_id, states in active.items())
        raise SubmissionError(
            f"jobs of this run are in the queue: {shown}. Wait for them, cancel them (scancel "
            f"{' '.join(active)}), or give --force: then two jobs may do the same work"
        )


def _check_array(slurm: Slurm, config: RunConfig, chain: Chain) -> None:
    tasks = config.slurm.preprocess.tasks or 1
    if not any(job.stage == "preprocess" for job in chain.jobs):
        return
    most = slurm.max_array_size()
    if most is not None and tasks > most:
        raise SubmissionError(
            f"slurm.preprocess.tasks: {tasks} tasks, and this cluster's arrays have at most {most} "
            f"(MaxArraySize in `scontrol show config`); set it to {most} or less: a task does all work units "
            f"that fall to it"
        )


def _refused(
    slurm: Slurm, record: Record, job: Job, command: list[str], error: SubmissionError, job_ids: list[str]
) -> SubmissionError:
    """The error to raise: what sbatch said, and what became of the jobs before, which are cancelled.

    A chain without its end would keep the queue busy, and block the corrected submission.
    """
    lines = [f"sbatch refuses the {job.stage} job: {error}", f"the command was: {shlex.join(command)}"]
    if "array" in str(error).lower():
        lines.append("the size of the array is slurm.preprocess.tasks")
    if job_ids:
        why = slurm.cancel(job_ids)
        if why:
            lines.append(f"submitted before it and NOT cancelled ({why}): scancel {' '.join(job_ids)}")
        else:
            record.add(cancelled=job_ids)
            lines.append(f"cancelled, so that nothing of this chain runs: {', '.join(job_ids)}")
    return SubmissionError("\n  ".join([*lines, "mend the cause and run the same command again"]))


def _table(chain: Chain, job_ids: dict[str, str]) -> Iterator[str]:
    """Stage, job, script, resources, and what it waits for."""
    rows = [("stage", "job", "after", "script", "resources")]
    for job in chain.jobs:
        after = job_ids[job.after] if job.after else "-"
        script = " ".join([job.script, *(word for word in job.arguments if word == "--merge")])
        rows.append((job.stage, job_ids[job.stage], after, script, job.resources))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield ""
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _hints(chain: Chain, job_ids: dict[str, str]) -> Iterator[str]:
    """How to follow the jobs."""
    yield f"squeue --jobs={','.join(job_ids.values())}"
    for job in chain.jobs:
        yield f"tail -F {job.log_pattern(job_ids[job.stage])}"
    yield f"scancel {' '.join(job_ids.values())}"
