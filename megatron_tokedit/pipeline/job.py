"""The preprocessing job: plan, units, merge; safe to kill and to run again.

    raw text -> plan.json -> units (any number of workers and machines) -> merge -> .bin .idx .edits .manifest
    .stats

Invariant: the same plan gives the same bytes for any number of workers, processes and restarts; a rerun of a
finished job does nothing; a rerun with another plan is refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import WorkUnit
from megatron_tokedit.dataset.loss_mask import LOSS_MASK_SUFFIXES
from megatron_tokedit.errors import ConfigError, PlanError
from megatron_tokedit.log import get_logger
from megatron_tokedit.pipeline.conversations import end_warning
from megatron_tokedit.pipeline.interrupts import Interrupts
from megatron_tokedit.pipeline.merge import clean_up, is_complete, merge
from megatron_tokedit.pipeline.method import useless_sampler
from megatron_tokedit.pipeline.plan import (
    Plan,
    load_plan,
    make_plan,
    recorded_prior_files,
    refuse_changed_files,
    refuse_changes,
)
from megatron_tokedit.pipeline.progress import LogProgress, Progress
from megatron_tokedit.pipeline.report import remarks
from megatron_tokedit.pipeline.resources import (
    JobTokenizers,
    PriorPlan,
    find_prior,
    load_tokenizers,
)
from megatron_tokedit.pipeline.results import Totals, UnitResult, check_bad_lines, check_devices
from megatron_tokedit.pipeline.workdir import WorkDir
from megatron_tokedit.pipeline.workers import DeadWorker, count_workers, run_in_process, run_in_workers

if TYPE_CHECKING:
    from megatron_tokedit.scoring.identity import PriorFiles

logger = get_logger(__name__)
Stage = Literal["all", "edit", "merge"]


@dataclass(frozen=True, slots=True)
class Result:
    """What a run of a job came to.

    Attributes:
        outcome: ``merged`` (the outputs were written now), ``already complete``, ``edited`` (this process's
            units are done; the merge is another process's or a later run's).
        prefixes: dataset (a JSON key, or a key's generation) -> its prefix.
        totals: the counts, where the outputs were written now.
    """

    outcome: Literal["merged", "already complete", "edited"]
    prefixes: dict[str, str]
    totals: Totals | None = None


def run(
    config: PreprocessConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    stage: Stage = "all",
    restart: bool = False,
    isolate: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Run a job, or this process's share of it. No collective: processes share only the file system.

    Args:
        config: the job.
        rank: this process takes the units ``rank`` mod ``world_size``.
        world_size: number of processes.
        stage: ``edit`` does the units, ``merge`` joins them, ``all`` does both (with several processes the
            one that finishes last merges).
        restart: discard a recorded plan and what was done under it.
        isolate: work in child processes even with one worker, so that this process's torch stays as it is.
        progress: is told how far it is; default: log lines every ``config.log_interval`` documents.

    Raises:
        TokeditError: everything that the user can mend; finished units are kept.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is one core; --workers says how many
    workdir = WorkDir(config.output_prefix)
    for warning in setting_warnings(config):
        logger.warning("%s", warning)
    tokenizers = load_tokenizers(config)
    if tokenizers.template and (warned := end_warning(config, tokenizers.text, tokenizers.template)):
        logger.warning("%s", warned)
    prefixes = {name: workdir.output(name) for key in config.json_keys for name in config.dataset_names(key)}
    if restart and world_size > 1:
        raise ConfigError(
            f"--restart: with several processes each would discard the others' work; remove {workdir.root} "
            "and run without --restart"
        )
    prior, plan = _settle(config, tokenizers, workdir, restart, only_merges=stage == "merge")
    job = _Job(config, tokenizers, prior, workdir, plan)
    with workdir.lock("units", shared=True):  # so that nobody merges, and removes the units, meanwhile
        if is_complete(config, workdir, job.plan):
            shutil.rmtree(workdir.units, ignore_errors=True)
            logger.info("already complete: %s", ", ".join(prefixes.values()))
            return Result("already complete", prefixes)
        if stage != "merge":
            share = job.plan.share(rank, world_size)
            _do_units(job, share, isolate, progress or LogProgress(config.log_interval))
            refuse_changed_files(job.plan)
    if stage == "edit" or not _may_merge(job, waits_for_others=world_size > 1 and stage == "all"):
        return Result("edited", prefixes)
    with workdir.lock("units") as alone:
        if is_complete(config, workdir, job.plan):
            return Result("already complete", prefixes)
        if alone:
            clean_up(config, workdir)
        totals = merge(config, tokenizers, prior, job.plan, workdir)
    _report(job, totals, prefixes)
    return Result("merged", prefixes, totals)


@dataclass(frozen=True, slots=True)
class _Job:
    """A job with everything that was found for it."""

    config: PreprocessConfig
    tokenizers: JobTokenizers
    prior: PriorPlan | None
    workdir: WorkDir
    plan: Plan

    def is_done(self, unit: WorkUnit) -> bool:
        """Whether a unit has its marker."""
        return self.workdir.unit_marker(unit.unit_id).exists()


def _settle(
    config: PreprocessConfig,
    tokenizers: JobTokenizers,
    workdir: WorkDir,
    restart: bool,
    *,
    only_merges: bool,
) -> tuple[PriorPlan | None, Plan]:
    """The prior and the plan. Of many processes that start at once, one reads the weights and the input.

    The others wait for its plan, which says what is in the files, and then look at the files' sizes and times
    of change only.
    """

    def known() -> PriorFiles | None:
        return recorded_prior_files(workdir.plan) if config.edits and not restart else None

    def find(files: PriorFiles | None) -> PriorPlan | None:
        return find_prior(
            config,
            tokenizers.text,
            template=tokenizers.template,
            only_merges=only_merges,
            known=files,
        )

    workdir.make()
    files = known()
    if files is None and config.edits:
        with workdir.lock("plan"):
            files = known()
            if files is None:
                prior = find(None)
                return prior, _establish_plan(config, tokenizers, prior, workdir, restart)
    prior = find(files)
    with workdir.lock("plan"):
        return prior, _establish_plan(config, tokenizers, prior, workdir, restart)


def _establish_plan(
    config: PreprocessConfig,
    tokenizers: JobTokenizers,
    prior: PriorPlan | None,
    workdir: WorkDir,
    restart: bool,
) -> Plan:
    """The recorded plan if it is the one asked for, else a new one, recorded before any work is done.

    For the holder of the plan's lock.
    """
    recorded = None if restart else load_plan(workdir.plan)
    plan = make_plan(config, tokenizers, prior, recorded)
    if recorded is not None and not workdir.is_untouched():
        refuse_changes(recorded, plan, workdir.plan)
        return plan
    if restart:
        _discard(workdir)
    else:
        refuse_overwriting(config, workdir)
    plan.save(workdir.plan)
    return plan


def _discard(workdir: WorkDir) -> None:
    """Remove what earlier runs recorded and did, when there is a new plan to take its place."""
    with workdir.lock("units"):
        for path in (workdir.plan, workdir.complete):
            path.unlink(missing_ok=True)
        shutil.rmtree(workdir.units, ignore_errors=True)


def refuse_overwriting(config: PreprocessConfig, workdir: WorkDir) -> None:
    """Refuse to replace a dataset that no recorded plan of this prefix made.

    Raises:
        PlanError: there is one.
    """
    names = [name for key in config.json_keys for name in config.dataset_names(key)]
    for name in names:
        for suffix in (".bin", ".idx", *(LOSS_MASK_SUFFIXES if config.is_sft else ())):
            path = Path(workdir.output(name) + suffix)
            if path.exists():
                raise PlanError(
                    f"{path} exists already and {workdir.root} does not say how it was made; give another "
                    "--output-prefix, or --restart to replace it"
                )


def _do_units(job: _Job, share: Sequence[WorkUnit], isolate: bool, progress: Progress) -> None:
    """Do the units of this process's share that are not done yet."""
    finished = [unit for unit in share if job.is_done(unit)]
    finished_ids = {unit.unit_id for unit in finished}
    pending = [unit for unit in share if unit.unit_id not in finished_ids]
    if not pending:
        logger.info(
            "nothing to do: of %d work units %d are for this process, and done",
            len(job.plan.units),
            len(share),
        )
        return
    workers = count_workers(job.config, job.prior, len(pending))
    dead: list[DeadWorker] = []
    in_workers = isolate or workers > 1
    with Interrupts(raise_at_once=not in_workers) as interrupts:
        logger.info(
            "work units to do: %d, done before: %d; workers: %d; text encoded by %s",
            len(pending),
            len(finished),
            workers,
            job.tokenizers.text.encoder,
        )
        results: Generator[UnitResult, None, None]
        if in_workers:
            results = run_in_workers(job.config, job.prior, pending, workers, progress, dead, interrupts)
        else:
            results = run_in_process(job.config, job.tokenizers, job.prior, pending, progress, interrupts)
        progress.start(_documents(share), _documents(finished))
        _take_results(job, finished, results, progress)
    undone = [unit for unit in pending if not job.is_done(unit)]
    for worker in dead:
        logger.warning("%s", worker)
    if undone:
        are = "work unit is" if len(undone) == 1 else "work units are"
        what = f"{len(undone)} {are} not done; run the same command again:"
        raise PlanError("\n  ".join([what, *map(str, dead)]))


def _take_results(
    job: _Job, finished: Sequence[WorkUnit], results: Generator[UnitResult, None, None], progress: Progress
) -> None:
    """Look at the results of finished units and at those to come."""
    bad_lines, examples = 0, list[str]()
    try:
        with closing(results):  # ends the workers at once, whatever goes wrong here
            for unit in finished:
                result = UnitResult.load(job.workdir.unit_marker(unit.unit_id))
                check_devices((result.device, job.prior.device if job.prior else None))
                bad_lines, examples = bad_lines + result.bad_lines, examples + result.bad_examples
            for result in results:
                bad_lines, examples = bad_lines + result.bad_lines, examples + result.bad_examples
                check_bad_lines(bad_lines, examples, job.config.max_bad_lines)
    finally:
        progress.close()


def _documents(units: Sequence[WorkUnit]) -> int:
    """Documents of the units."""
    return sum(unit.num_documents for unit in units)


def _may_merge(job: _Job, *, waits_for_others: bool) -> bool:
    """Whether all units are done; if not, whether that is in order.

    Raises:
        PlanError: units are missing and nobody is going to do them.
    """
    missing = [unit.unit_id for unit in job.plan.units if not job.is_done(unit)]
    if not missing or is_complete(job.config, job.workdir, job.plan):
        return True
    if waits_for_others:
        logger.info("%d work units of other processes are not done yet; the last one merges", len(missing))
        return False
    shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    raise PlanError(
        f"cannot merge: {len(missing)} of {len(job.plan.units)} work units are not done (units {shown}); "
        "run the job's edit stage for all ranks first"
    )


def setting_warnings(config: PreprocessConfig) -> Iterator[str]:
    """What is odd about the settings, though it can be honoured."""
    if idle := config.idle_settings:
        yield f"without effect with edit_strategy {config.strategy}: {', '.join(idle)}"
    if config.edits and (why := useless_sampler(config)):
        yield why


def _report(job: _Job, totals: Totals, prefixes: dict[str, str]) -> None:
    """Log what came out."""
    for name, prefix in prefixes.items():
        counts = totals.keys[name]
        logger.info(
            "%s: %d documents in, %d out, %d bad lines; %d tokens",
            prefix,
            totals.documents_in,
            counts.documents,
            totals.bad_lines,
            counts.tokens,
        )
        for remark in remarks(job.config, job.tokenizers, totals, name):
            logger.warning("%s: %s", prefix, remark)
