"""From finished units to the outputs: dataset, journal, statistics and manifest of each JSON key.

Invariant: units are joined in the order of the plan, so the outputs are those of a single pass; documents in
= documents out + documents dropped, by reason; the manifest of a key is written after its other files.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.dataset import (
    InputRecord,
    Manifest,
    TokenizerRecord,
    atomic_write_bytes,
    best_dtype,
    merge_datasets,
    merge_journals,
    remove_temporaries,
    write_manifest,
)
from megatron_tokedit.edit.statistics import MARGIN, EditStatistics
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.log import get_logger
from megatron_tokedit.pipeline.plan import Plan
from megatron_tokedit.pipeline.resources import PriorPlan
from megatron_tokedit.pipeline.unit import (
    MAX_EXAMPLES,
    STEPS,
    KeyCounts,
    UnitResult,
    check_bad_lines,
    check_devices,
)
from megatron_tokedit.pipeline.workdir import OUTPUT_SUFFIXES, WorkDir
from megatron_tokedit.tokenizers import Tokenizer, tokenizer_spec

logger = get_logger(__name__)
_PACKAGES = ("megatron_tokedit", "numpy", "sentencepiece", "tokenizers")
_PRIOR_PACKAGES = ("torch", "transformers", "megatron-core")


@dataclass(slots=True)
class Totals:
    """The counts of all units.

    Attributes:
        documents_in: read, bad lines included.
        bytes_in: UTF-8 bytes of the documents' text.
        bad_lines: lines that were no documents.
        bad_examples: the first of them.
        devices: where the prior ran.
        keys: JSON key -> what was written.
        seconds: step -> time spent, summed over workers.
    """

    documents_in: int = 0
    bytes_in: int = 0
    bad_lines: int = 0
    bad_examples: list[str] = field(default_factory=list)
    devices: set[str | None] = field(default_factory=set)
    keys: dict[str, KeyCounts] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))

    def add(self, result: UnitResult) -> None:
        """Add a unit; units must come in the order of the plan."""
        self.documents_in += result.documents_in
        self.bytes_in += result.bytes_in
        self.bad_lines += result.bad_lines
        self.devices.add(result.device)
        self.bad_examples += result.bad_examples[: MAX_EXAMPLES - len(self.bad_examples)]
        for key, counts in result.keys.items():
            self.keys.setdefault(key, KeyCounts()).merge(counts)
        for step, seconds in result.seconds.items():
            self.seconds[step] += seconds


def merge(
    config: PreprocessConfig, tokenizer: Tokenizer, prior: PriorPlan | None, plan: Plan, workdir: WorkDir
) -> Totals:
    """Join the finished units of a plan into the outputs, and remove the units.

    Raises:
        DataFormatError: too many bad lines over all units, no document at all, or a damaged part.
        PlanError: the prior ran on several kinds of device.
    """
    totals = Totals()
    for unit in plan.units:
        totals.add(UnitResult.load(workdir.unit_marker(unit.unit_id)))
    check_bad_lines(totals.bad_lines, totals.bad_examples, config.max_bad_lines)
    check_devices(totals.devices)
    if totals.documents_in == totals.bad_lines:
        raise DataFormatError(f"no document in {totals.documents_in} lines of the input; nothing is written")
    for key in config.json_keys:
        _merge_key(config, tokenizer, prior, plan, workdir, key, totals)
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
    for path in (*output_files(config, workdir), str(workdir.complete)):
        remove_temporaries(path)


def _output_sizes(config: PreprocessConfig, workdir: WorkDir) -> dict[str, int]:
    """Name of each output, without its folder -> bytes."""
    return {os.path.basename(path): os.path.getsize(path) for path in output_files(config, workdir)}


def output_files(config: PreprocessConfig, workdir: WorkDir) -> Iterator[str]:
    """Paths of all files that the job leaves."""
    suffixes = OUTPUT_SUFFIXES if config.edits else OUTPUT_SUFFIXES[:-1]
    for key in config.json_keys:
        for suffix in suffixes:
            yield workdir.output(key) + suffix


def _merge_key(
    config: PreprocessConfig,
    tokenizer: Tokenizer,
    prior: PriorPlan | None,
    plan: Plan,
    workdir: WorkDir,
    key: str,
    totals: Totals,
) -> None:
    """Write the five files of one key."""
    output = workdir.output(key)
    for suffix in (".manifest.json", ".edits"):  # they would belong to an older dataset
        Path(output + suffix).unlink(missing_ok=True)
    parts = [workdir.unit_part(unit.unit_id, key) for unit in plan.units]
    summary = merge_datasets(parts, output)
    checksums = {"bin": summary.bin_sha256, "idx": summary.idx_sha256}
    if prior is not None:
        checksums["edits"] = merge_journals([f"{part}.edits" for part in parts], f"{output}.edits")
    statistics = _statistics(totals, key)
    atomic_write_bytes(f"{output}.stats.json", orjson.dumps(statistics, option=orjson.OPT_INDENT_2))
    manifest = Manifest(
        versions=_versions(prior is not None),
        inputs=[
            InputRecord(
                path=file.path,
                format=file.format,
                num_bytes=file.num_bytes,
                sha256=file.sha256,
                num_documents=file.num_documents,
            )
            for file in plan.inputs
        ],
        json_key=key,
        tokenizer=TokenizerRecord(**tokenizer_spec(tokenizer)),
        append_eod=config.append_eod,
        dtype=str(np.dtype(best_dtype(tokenizer.vocab_size))),
        seed=config.seed if prior else None,
        edit=plan.settings["edit"] if prior else None,
        prior=_prior_record(prior, totals) if prior else None,
        counts=_counts(totals, key),
        checksums=checksums,
    )
    write_manifest(output, manifest)


def _prior_record(prior: PriorPlan, totals: Totals) -> dict[str, Any]:
    """The manifest's prior."""
    (device,) = totals.devices
    return {"path": prior.identity.path, "device": device, **prior.settings()}


def _counts(totals: Totals, key: str) -> dict[str, int]:
    """The manifest's counts."""
    counts = totals.keys[key]
    edit = counts.edit or EditStatistics()
    return {
        "num_documents": counts.documents,
        "num_sequences": counts.sequences,
        "num_tokens": counts.tokens,
        "num_documents_in": totals.documents_in,
        "num_bad_lines": totals.bad_lines,
        "num_scored_tokens": edit.scored,
        "num_eligible_tokens": edit.eligible,
        "num_resampled_tokens": edit.resampled,
        "num_changed_tokens": edit.changed,
        "num_dropped_tokens": edit.dropped,
    }


def _statistics(totals: Totals, key: str) -> dict[str, Any]:
    """The content of ``.stats.json``."""
    counts = totals.keys[key]
    seconds = sum(totals.seconds.values())
    tokens = sum(counts.tokens for counts in totals.keys.values())
    statistics: dict[str, Any] = {
        "documents": {
            "in": totals.documents_in,
            "out": counts.documents,
            "dropped": {"bad_line": totals.bad_lines},
        },
        "bytes_in": totals.bytes_in,
        "sequences": counts.sequences,
        "tokens": counts.tokens,
        "eod_in_text": counts.eod_in_text,
        "bad_lines": totals.bad_examples,
        "worker_seconds": {step: round(value, 3) for step, value in totals.seconds.items()},
        "tokens_per_worker_second": round(tokens / max(seconds, 1e-9), 1),
    }
    if counts.edit is not None:
        statistics["edit"] = _edit_statistics(counts.edit)
    return statistics


def _edit_statistics(edit: EditStatistics) -> dict[str, Any]:
    """What was scored and edited, with the shares that people quote."""
    return {
        "tokens": edit.tokens,
        "scored": edit.scored,
        "eligible": edit.eligible,
        "resampled": edit.resampled,
        "changed": edit.changed,
        "dropped": edit.dropped,
        "eligible_share": edit.eligible / max(edit.tokens, 1),
        "changed_share_of_eligible": edit.changed / max(edit.eligible, 1),
        "within_margin_of_threshold": {"margin": MARGIN, "tokens": edit.margin},
        "perplexity": edit.perplexity,
        "p_histogram_10": edit.histogram.reshape(10, -1).sum(axis=1).tolist(),
        "p_histogram_100": edit.histogram.tolist(),
    }


def _versions(with_prior: bool) -> dict[str, str]:
    """Versions of what may change the bytes."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES + (_PRIOR_PACKAGES if with_prior else ()):
        versions[package] = importlib.metadata.version(package)
    return versions
