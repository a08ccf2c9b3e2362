"""From finished units to the outputs: dataset, journal, statistics and manifest of each key and generation.

Invariant: units are joined in the order of the plan, so the outputs are those of a single pass; the manifest
of a dataset is written after its other files.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.dataset import (
    ConversationRecord,
    InputRecord,
    Manifest,
    TokenizerRecord,
    atomic_write_bytes,
    best_dtype,
    merge_datasets,
    merge_journals,
    remove_temporaries,
    sha256_of_file,
    shorten_inputs,
    write_manifest,
)
from megatron_tokedit.dataset.loss_mask import LOSS_MASK_SUFFIXES, loss_mask_prefix
from megatron_tokedit.edit.statistics import EditStatistics
from megatron_tokedit.errors import DataFormatError, PlanError
from megatron_tokedit.log import get_logger
from megatron_tokedit.pipeline.method import edit_settings
from megatron_tokedit.pipeline.plan import Plan
from megatron_tokedit.pipeline.report import dataset_statistics
from megatron_tokedit.pipeline.resources import JobTokenizers, PriorPlan, conversation_settings
from megatron_tokedit.pipeline.results import Totals, UnitResult, check_bad_lines, check_devices
from megatron_tokedit.pipeline.workdir import WorkDir, output_suffixes
from megatron_tokedit.tokenizers import tokenizer_spec

logger = get_logger(__name__)
_PACKAGES = ("megatron_tokedit", "numpy", "sentencepiece", "tokenizers")
_PRIOR_PACKAGES = ("torch", "transformers", "megatron-core")


def merge(
    config: PreprocessConfig, tokenizers: JobTokenizers, prior: PriorPlan | None, plan: Plan, workdir: WorkDir
) -> Totals:
    """Join the finished units of a plan into the outputs, and remove the units.

    Raises:
        DataFormatError: too many bad lines over all units, or no document at all.
        PlanError: a missing or damaged marker or part, or the prior ran on several kinds of device.
    """
    totals = Totals()
    checksums_of: dict[int, dict[str, dict[str, str]]] = {}
    for unit in plan.units:
        result = UnitResult.load(workdir.unit_marker(unit.unit_id))
        totals.add(result)
        checksums_of[unit.unit_id] = {name: counts.checksums for name, counts in result.keys.items()}
    check_bad_lines(totals.bad_lines, totals.bad_examples, config.max_bad_lines)
    check_devices(totals.devices)
    if totals.documents_in == totals.bad_lines:
        raise DataFormatError(f"no document in {totals.documents_in} lines of the input; nothing is written")
    for key in config.json_keys:
        for generation, name in enumerate(config.dataset_names(key), 1):
            output = workdir.output(name)
            first = (".idx",) if config.is_sft else ()  # so that none is ever there without its mask
            for suffix in (*first, ".manifest.json", ".edits", *LOSS_MASK_SUFFIXES):  # of an older dataset
                Path(output + suffix).unlink(missing_ok=True)
            checksums = _join_units(config, checksums_of, workdir, name)
            statistics = dataset_statistics(config, tokenizers, totals, name)
            atomic_write_bytes(f"{output}.stats.json", orjson.dumps(statistics, option=orjson.OPT_INDENT_2))
            manifest = _manifest(config, tokenizers, prior, plan, totals, (key, name, generation), checksums)
            write_manifest(output, manifest)
    complete = {"fingerprint": plan.fingerprint, "outputs": _output_sizes(config, workdir)}
    atomic_write_bytes(workdir.complete, orjson.dumps(complete, option=orjson.OPT_INDENT_2))
    shutil.rmtree(workdir.units, ignore_errors=True)
    return totals


def is_complete(config: PreprocessConfig, workdir: WorkDir, plan: Plan) -> bool:
    """Whether the outputs of this very plan are there, whole; also where the folder was moved."""
    try:
        complete = orjson.loads(workdir.complete.read_bytes())
        return bool(
            complete["fingerprint"] == plan.fingerprint
            and complete["outputs"] == _output_sizes(config, workdir)
        )
    except (OSError, ValueError, KeyError):
        return False


def clean_up(config: PreprocessConfig, workdir: WorkDir) -> None:
    """Remove what a merge left that was killed. Only for the holder of the units' lock."""
    for path in (*output_files(config, workdir), str(workdir.complete), str(workdir.plan)):
        remove_temporaries(path)


def _output_sizes(config: PreprocessConfig, workdir: WorkDir) -> dict[str, int]:
    """Name of each output, without its folder -> bytes."""
    return {os.path.basename(path): os.path.getsize(path) for path in output_files(config, workdir)}


def output_files(config: PreprocessConfig, workdir: WorkDir) -> Iterator[str]:
    """Paths of all files that the job leaves."""
    for key in config.json_keys:
        for name in config.dataset_names(key):
            for suffix in output_suffixes(config):
                yield workdir.output(name) + suffix


def _join_units(
    config: PreprocessConfig,
    checksums_of: dict[int, dict[str, dict[str, str]]],
    workdir: WorkDir,
    name: str,
) -> dict[str, str]:
    """Write dataset and journal of one name; returns their checksums.

    Args:
        config: the job.
        checksums_of: unit -> name -> suffix -> SHA-256 (hex) of what it wrote, in the order of the plan.
        workdir: of the job.
        name: of the dataset.
    """

    def check(unit_id: int, *suffixes: str) -> None:
        sums = checksums_of[unit_id][name]
        _check_part(workdir, unit_id, name, {suffix: sums[suffix] for suffix in suffixes if suffix in sums})

    output = workdir.output(name)
    parts = {workdir.unit_part(unit_id, name): unit_id for unit_id in checksums_of}
    for unit_id in checksums_of:
        check(unit_id, ".idx", ".edits", *LOSS_MASK_SUFFIXES)
    mask_checksums = {}
    if config.is_sft:  # before .idx, which says that a dataset is whole
        mask = merge_datasets([loss_mask_prefix(part) for part in parts], loss_mask_prefix(output))
        mask_checksums = {"loss_mask.bin": mask.bin_sha256, "loss_mask.idx": mask.idx_sha256}
    summary = merge_datasets(list(parts), output, on_part=lambda part: check(parts[part], ".bin"))
    checksums = {"bin": summary.bin_sha256, "idx": summary.idx_sha256, **mask_checksums}
    if config.edits:
        checksums["edits"] = merge_journals([f"{part}.edits" for part in parts], f"{output}.edits")
    return checksums


def _check_part(workdir: WorkDir, unit_id: int, name: str, checksums: dict[str, str]) -> None:
    """Refuse a unit's files that are not those it wrote.

    Raises:
        PlanError: one is missing or damaged.
    """
    for suffix, sha256 in checksums.items():
        path = workdir.unit_part(unit_id, name) + suffix
        if not os.path.isfile(path) or sha256_of_file(path) != sha256:
            raise PlanError(
                f"{path}: is missing or not what work unit {unit_id} wrote; remove "
                f"{workdir.unit_marker(unit_id)} and run again to do the unit anew"
            )


def _manifest(
    config: PreprocessConfig,
    tokenizers: JobTokenizers,
    prior: PriorPlan | None,
    plan: Plan,
    totals: Totals,
    dataset: tuple[str, str, int],
    checksums: dict[str, str],
) -> Manifest:
    """The manifest of one dataset, given as JSON key, name and generation."""
    key, name, generation = dataset
    written = tokenizers.written
    inputs, omitted = shorten_inputs(
        InputRecord(
            path=file.path,
            format=file.format,
            num_bytes=file.num_bytes,
            sha256=file.sha256,
            num_documents=file.num_documents,
        )
        for file in plan.inputs
    )
    return Manifest(
        versions=_versions(prior is not None),
        inputs=inputs,
        omitted_inputs=omitted,
        json_key=key,
        tokenizer=TokenizerRecord(**tokenizer_spec(written)),
        prior_tokenizer=TokenizerRecord(**tokenizer_spec(tokenizers.text)) if tokenizers.output else None,
        append_eod=config.append_eod,
        special_tokens_in_text=config.special_tokens_in_text,
        dtype=str(np.dtype(best_dtype(written.vocab_size))),
        seed=config.seed if prior else None,
        edit=edit_settings(config, generation) if prior else None,
        conversation=(
            ConversationRecord(**conversation_settings(config, tokenizers.template, prior))
            if tokenizers.template
            else None
        ),
        prior=_prior_record(prior, totals) if prior else None,
        counts=_counts(totals, name),
        checksums=checksums,
    )


def _prior_record(prior: PriorPlan, totals: Totals) -> dict[str, Any]:
    """The manifest's prior."""
    (device,) = totals.devices
    return {"path": prior.identity.path, "device": device, **prior.settings()}


def _counts(totals: Totals, name: str) -> dict[str, int]:
    """The manifest's counts."""
    counts = totals.keys[name]
    edit = counts.edit or EditStatistics()
    return {
        "num_documents": counts.documents,
        "num_sequences": counts.sequences,
        "num_tokens": counts.tokens,
        "num_documents_in": totals.documents_in,
        "num_bad_lines": totals.bad_lines,
        "num_documents_dropped": sum(counts.dropped.values()),
        "num_documents_unedited": sum(counts.unedited.values()),
        "num_tokens_in": edit.tokens,
        "num_scored_tokens": edit.scored,
        "num_eligible_tokens": edit.eligible,
        "num_resampled_tokens": edit.resampled,
        "num_changed_tokens": edit.changed,
        "num_dropped_tokens": edit.dropped,
        **({"num_loss_tokens": counts.conversations.get("loss_tokens", 0)} if counts.conversations else {}),
    }


def _versions(with_prior: bool) -> dict[str, str]:
    """Versions of what may change the bytes."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES + (_PRIOR_PACKAGES if with_prior else ()):
        versions[package] = importlib.metadata.version(package)
    return versions
