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
from megatron_tokedit.corpus import WorkUnit
from megatron_tokedit.dataset import best_dtype
from megatron_tokedit.dataset.loss_mask import loss_mask_prefix
from megatron_tokedit.edit.rules import rule_in_words
from megatron_tokedit.errors import PlanError, TokeditError
from megatron_tokedit.pipeline.estimate import estimate
from megatron_tokedit.pipeline.groups import read_documents
from megatron_tokedit.pipeline.job import refuse_overwriting, setting_warnings
from megatron_tokedit.pipeline.merge import is_complete
from megatron_tokedit.pipeline.plan import Plan, load_plan, make_plan, recorded_prior_files, refuse_changes
from megatron_tokedit.pipeline.preview import preview
from megatron_tokedit.pipeline.resources import (
    JobTokenizers,
    PriorPlan,
    find_prior,
    load_tokenizers,
)
from megatron_tokedit.pipeline.results import check_bad_lines
from megatron_tokedit.pipeline.workdir import WorkDir, output_suffixes
from megatron_tokedit.pipeline.workers import count_workers

Value = TypeVar("Value")
_SAMPLE_DOCUMENTS = 100
"""Documents of each input file that a dry run reads."""
_SAMPLE_FILES = 200
"""Input files that a dry run reads the first documents of, spread over all."""
_SHOWN_FILES = 10


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
    """Inspect a job and estimate its cost: reads the input files and the tokenizers, scores a sample with the
    prior, and writes nothing.

    Args:
        config: the job.
        restart: a recorded plan would be discarded.
    """
    report = DryRun()
    report.lines += [
        f"warning     {warning}" for warning in report.attempt(lambda: [*setting_warnings(config)]) or []
    ]
    workdir = WorkDir(config.output_prefix)
    tokenizers = report.attempt(lambda: load_tokenizers(config))
    recorded = None if restart else report.attempt(lambda: load_plan(workdir.plan))
    plan = None
    if tokenizers is not None:
        found = tokenizers
        report.lines += _describe_tokenizers(tokenizers)
        known = recorded_prior_files(workdir.plan) if config.edits and not restart else None
        prior = report.attempt(lambda: find_prior(config, found.text, template=found.template, known=known))
        plan = report.attempt(lambda: make_plan(config, found, prior, recorded))
        workers = count_workers(config, prior, len(plan.units)) if plan is not None else 0
        report.lines += _describe(config, prior, plan, workers)
    if plan is not None and tokenizers is not None:
        planned = plan
        if recorded is not None:
            report.attempt(lambda: refuse_changes(recorded, planned, workdir.plan))
        report.attempt(lambda: _check_first_documents(config, planned))
        if config.is_sft:
            report.lines += report.attempt(lambda: preview(config, found, prior, planned)) or []
        if not report.problems:
            report.lines += report.attempt(lambda: estimate(config, found, prior, planned, workers)) or []
    report.attempt(lambda: _check_output(config, workdir))
    if plan is not None and recorded is not None and not report.problems:
        report.lines.append(_state(config, plan, workdir))
    elif not restart and recorded is None:
        report.attempt(lambda: refuse_overwriting(config, workdir))
    return report


def _describe_tokenizers(tokenizers: JobTokenizers) -> list[str]:
    """What reads the text and what is written."""
    text, written = tokenizers.text, tokenizers.written
    dtype = np.dtype(best_dtype(written.vocab_size))
    lines = [
        f"tokenizer   {text.tokenizer_type} {text.tokenizer_model}, {text.vocab_size} ids, {text.encoder}"
    ]
    if tokenizers.output is not None:
        lines.append(
            f"output      {written.tokenizer_type} {written.tokenizer_model}, {written.vocab_size} ids"
        )
    return [*lines, f"written as  {dtype}"]


def _describe(
    config: PreprocessConfig, prior: PriorPlan | None, plan: Plan | None, workers: int
) -> list[str]:
    """Prior, inputs, units and outputs."""
    lines = []
    if prior is not None:
        options = prior.options
        identity = prior.identity
        lines.append(
            f"prior       {identity.path} ({identity.backend}, vocabulary {identity.vocab_size}), "
            f"{prior.dtype} on {prior.device}, windows of {options.context_tokens} tokens, "
            f"overlap {options.overlap_tokens}"
        )
        if prior.layout.num_ranks > 1:
            lines.append(
                f"processes   {prior.layout.num_ranks} a copy of the prior (tensor {prior.layout.tensor} x "
                f"pipeline {prior.layout.pipeline}); start a multiple of them with torchrun"
            )
        lines += _describe_edit(plan)
    if plan is not None:
        for file in plan.inputs[:_SHOWN_FILES]:
            counts = f"{file.num_documents:,} documents, {file.num_bytes:,} bytes"
            lines.append(f"input       {file.path}: {counts}, {file.format}")
        if len(plan.inputs) > _SHOWN_FILES:
            lines.append(f"input       ... {len(plan.inputs)} files in all")
        text_bytes = sum(unit.num_bytes for unit in plan.units)
        lines.append(
            f"work        {len(plan.units):,} unit{'s' if len(plan.units) > 1 else ''}, "
            f"{plan.num_documents:,} documents, {text_bytes:,} bytes of input, "
            f"{workers} worker{'s' if workers > 1 else ''}"
        )
    suffixes = ",".join(each[1:] for each in output_suffixes(config) if each.startswith("."))
    for key in config.json_keys:
        for name in config.dataset_names(key):
            output = WorkDir(config.output_prefix).output(name)
            lines.append(f"writes      {output}.{{{suffixes}}}")
            if config.is_sft:
                lines.append(f"            {loss_mask_prefix(output)}.{{bin,idx}}")
    return lines


def _describe_edit(plan: Plan | None) -> list[str]:
    """The edit settings of a plan, and its rules one by one."""
    settings = dict(plan.settings["edit"]) if plan is not None else {}
    settings.pop("generation", None)  # the last one: the same number as generations
    rules = map(rule_in_words, settings.pop("rules", []))
    shown = [f"{name} {value}" for name, value in settings.items() if value not in (None, False)]
    return [f"rule        {rule}" for rule in rules] + ([f"edit        {', '.join(shown)}"] if shown else [])


def _check_first_documents(config: PreprocessConfig, plan: Plan) -> None:
    """Read the first documents of every input file.

    Raises:
        DataFormatError: more of their lines are bad than allowed.
    """
    bad: list[str] = []
    first_units: dict[str, WorkUnit] = {}
    for unit in plan.units:
        first_units.setdefault(unit.parts[0].path, unit)
    chosen = [*first_units.values()]
    for unit in chosen[:: max(1, len(chosen) // _SAMPLE_FILES)]:
        documents = read_documents(config, unit, on_bad=lambda line: bad.append(str(line)))
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
