"""What a job would do, and everything that would stop it, without touching anything.

Invariant: no file is written; every problem is reported, not only the first.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import read_unit
from megatron_tokedit.dataset import best_dtype
from megatron_tokedit.errors import PlanError, TokeditError
from megatron_tokedit.pipeline.job import refuse_overwriting
from megatron_tokedit.pipeline.merge import is_complete, output_files
from megatron_tokedit.pipeline.plan import Plan, load_plan, make_plan, refuse_changes
from megatron_tokedit.pipeline.resources import PriorPlan, find_prior
from megatron_tokedit.pipeline.unit import check_bad_lines
from megatron_tokedit.pipeline.workdir import WorkDir
from megatron_tokedit.pipeline.workers import count_workers
from megatron_tokedit.tokenizers import Tokenizer, load_tokenizer

Value = TypeVar("Value")
_SAMPLE_DOCUMENTS = 100
"""Documents of each input file that a dry run reads."""


@dataclass(slots=True)
class DryRun:
    """The report of a dry run.

    Attributes:
        lines: what would be done.
        problems: what would stop it; empty where nothing would.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, step: Callable[[], Value]) -> Value | None:
        """Do a step of the inspection; a problem is noted and the result is None."""
        try:
            return step()
        except TokeditError as error:
            self.problems.append(str(error))
            return None


def inspect_job(config: PreprocessConfig, *, restart: bool = False) -> DryRun:
    """Inspect a job: reads the input files, the tokenizer and the prior's files, and writes nothing.

    Args:
        config: the job.
        restart: a recorded plan would be discarded.
    """
    report = DryRun()
    workdir = WorkDir(config.output_prefix)
    tokenizer = report.attempt(lambda: load_tokenizer(config.tokenizer_type, config.tokenizer_model))
    recorded = None if restart else report.attempt(lambda: load_plan(workdir.plan))
    prior, plan = None, None
    if tokenizer is not None:
        report.lines.append(
            f"tokenizer   {config.tokenizer_type}, {tokenizer.vocab_size} ids, written as "
            f"{np.dtype(best_dtype(tokenizer.vocab_size))}"
        )
        prior = report.attempt(lambda: find_prior(config, tokenizer))
        plan = report.attempt(lambda: make_plan(config, tokenizer, prior, recorded))
        report.lines += _describe(config, tokenizer, prior, plan)
    if plan is not None:
        report.attempt(lambda: _check_first_documents(config, plan))
    report.attempt(lambda: _check_output(config, workdir))
    if plan is not None and recorded is not None and not report.problems:
        report.attempt(lambda: refuse_changes(recorded, plan, workdir.plan))
        report.lines.append(_state(config, plan, workdir))
    elif not restart and recorded is None:
        report.attempt(lambda: refuse_overwriting(config, workdir))
    return report


def _describe(
    config: PreprocessConfig, tokenizer: Tokenizer, prior: PriorPlan | None, plan: Plan | None
) -> list[str]:
    """Prior, inputs, units and outputs."""
    lines = []
    if prior is not None:
        options = prior.options
        identity = prior.identity
        lines.append(
            f"prior       {identity.path} ({identity.backend}, vocabulary {identity.vocab_size}), "
            f"{prior.dtype}, windows of {options.context_tokens} tokens, overlap {options.overlap_tokens}"
        )
        lines.append("edit        " + ", ".join(f"{k} {v}" for k, v in _method(plan).items()))
    if plan is not None:
        for file in plan.inputs:
            counts = f"{file.num_documents} documents, {file.num_bytes} bytes"
            lines.append(f"input       {file.path}: {counts}, {file.format}")
        text_bytes = sum(unit.num_bytes for unit in plan.units)
        workers = count_workers(config, prior, len(plan.units))
        lines.append(
            f"work        {len(plan.units)} units, {plan.num_documents} documents, {text_bytes} bytes of "
            f"input, {workers} worker{'s' if workers > 1 else ''}"
        )
    lines += [f"output      {path}" for path in output_files(config, WorkDir(config.output_prefix))]
    return lines


def _method(plan: Plan | None) -> dict[str, object]:
    """The edit settings of a plan."""
    return dict(plan.settings["edit"]) if plan is not None else {}


def _check_first_documents(config: PreprocessConfig, plan: Plan) -> None:
    """Read the first documents of every input file.

    Raises:
        DataFormatError: more of their lines are bad than allowed.
    """
    bad: list[str] = []
    for path in {unit.path: None for unit in plan.units}:
        first = next(unit for unit in plan.units if unit.path == path)
        documents = read_unit(first, config.json_keys, on_bad=lambda line: bad.append(str(line)))
        for _ in itertools.islice(documents, _SAMPLE_DOCUMENTS):
            if len(bad) > config.max_bad_lines:
                break
        check_bad_lines(len(bad), bad, config.max_bad_lines)


def _check_output(config: PreprocessConfig, workdir: WorkDir) -> None:
    """Refuse an output folder that cannot be written or made.

    Raises:
        PlanError: it cannot.
    """
    folder = Path(os.path.abspath(workdir.root)).parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PlanError(
            f"--output-prefix {config.output_prefix}: {folder} is not a folder that can be written"
        )


def _state(config: PreprocessConfig, plan: Plan, workdir: WorkDir) -> str:
    """How far the recorded job is."""
    if is_complete(config, workdir, plan):
        return "state       already complete; a run would do nothing"
    done = sum(workdir.unit_marker(unit.unit_id).exists() for unit in plan.units)
    return f"state       {done} of {len(plan.units)} units are done"
