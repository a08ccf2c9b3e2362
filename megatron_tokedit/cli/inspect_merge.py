"""``inspect_dataset.py merge``: several datasets as one, with all that lies beside them.

Invariant: the result is what a single pass over the inputs of all parts would have written, as far as it can
be added up; its manifest is written last, so a merge that was killed leaves nothing that looks whole.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_tokedit.cli.inspect_files import progress_bar, size_on_disk
from megatron_tokedit.dataset import (
    DatasetSummary,
    IndexedDataset,
    Manifest,
    NoEdits,
    atomic_write_bytes,
    check_mergeable,
    merge_datasets,
    merge_journals,
    merge_manifests,
    read_manifest,
    refuse_existing,
    verify_dataset,
    write_manifest,
)
from megatron_tokedit.dataset.journal_format import JOURNAL_SUFFIX
from megatron_tokedit.dataset.loss_mask import has_loss_mask, loss_mask_prefix
from megatron_tokedit.dataset.manifest import STATISTICS_SUFFIX
from megatron_tokedit.edit.statistics import EditStatistics
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.log import get_logger
from megatron_tokedit.pipeline.report import conversation_statistics, edit_statistics

logger = get_logger(__name__)
_ADDED = ("documents", "bytes", "sequences", "tokens", "special_tokens_in_text")
_MAX_BAD_LINES = 20


def merge(arguments: argparse.Namespace) -> None:
    """Check the parts, join them, say what came out.

    Raises:
        DataFormatError: a part is damaged, parts do not fit together, or the output is there already.
    """
    output, parts = arguments.output, arguments.parts
    refuse_existing(output)
    manifests = {part: read_manifest(part) for part in parts}
    with_manifest = {part: manifest for part, manifest in manifests.items() if manifest is not None}
    if with_manifest:
        check_mergeable(with_manifest, allow_different_edits=arguments.allow_different_edits)
    _refuse_some_without_loss_mask(parts)
    total = sum(size_on_disk(part) for part in parts)
    with progress_bar("verify", total, "B", quiet=arguments.quiet) as on_bytes:
        for part in parts:
            verify_dataset(part, on_bytes=on_bytes)
    _warn_of_repetition(parts, with_manifest)
    statistics = _merged_statistics_of(parts)
    edits_sha256 = _merge_journals(parts, output)
    loss_mask = _merge_loss_masks(parts, output)
    summary = merge_datasets(parts, output)
    if statistics is not None:
        atomic_write_bytes(
            f"{output}{STATISTICS_SUFFIX}", orjson.dumps(statistics, option=orjson.OPT_INDENT_2)
        )
    bare = [part for part in parts if part not in with_manifest]
    if bare:
        logger.warning("%s gets no manifest; without one: %s", output, ", ".join(dict.fromkeys(bare)))
    else:
        write_manifest(
            output,
            merge_manifests([with_manifest[part] for part in parts], summary, edits_sha256, loss_mask),
        )
    if not arguments.quiet:
        written = {
            ".edits": edits_sha256,
            "_loss_mask.bin, .idx": loss_mask,
            STATISTICS_SUFFIX: statistics,
            ".manifest.json": not bare,
        }
        others = "".join(f", {suffix}" for suffix, there in written.items() if there)
        print(
            f"{output}.bin, .idx{others}: {len(parts)} parts, "
            f"{summary.num_documents:,} documents, {summary.num_tokens:,} tokens"
        )


def _warn_of_repetition(parts: Sequence[str], manifests: dict[str, Manifest]) -> None:
    """Warn of inputs that come in twice."""
    inputs = Counter(
        record.sha256 for part in parts if part in manifests for record in manifests[part].inputs
    )
    twice = {
        record.path
        for manifest in manifests.values()
        for record in manifest.inputs
        if inputs[record.sha256] > 1
    }
    if twice:
        logger.warning("the same text comes in more than once: %s", ", ".join(sorted(twice)))


def _merge_journals(parts: Sequence[str], output: str) -> str | None:
    """Join the journals; returns the SHA-256 of the result, None where no part has one."""
    paths = [f"{part}{JOURNAL_SUFFIX}" for part in parts]
    if not any(map(os.path.isfile, paths)):
        return None
    journals: list[str | NoEdits] = []
    for part, path in zip(parts, paths, strict=True):
        if os.path.isfile(path):
            journals.append(path)
        else:
            dataset = IndexedDataset(part)
            journals.append(NoEdits(dataset.dtype, dataset.num_documents))
    return merge_journals(journals, f"{output}{JOURNAL_SUFFIX}")


def _refuse_some_without_loss_mask(parts: Sequence[str]) -> None:
    """Refuse to join text and conversations.

    Raises:
        DataFormatError: some parts have a loss mask, others have none.
    """
    without = [part for part in parts if not has_loss_mask(part)]
    if without and len(without) < len(parts):
        raise DataFormatError(
            f"{', '.join(without)}: no loss mask, but others have one; text and conversations cannot be one "
            "dataset"
        )


def _merge_loss_masks(parts: Sequence[str], output: str) -> DatasetSummary | None:
    """Join the loss masks; None where the parts have none."""
    if not has_loss_mask(parts[0]):
        return None
    return merge_datasets([loss_mask_prefix(part) for part in parts], loss_mask_prefix(output))


def _merged_statistics_of(parts: Sequence[str]) -> dict[str, Any] | None:
    """The statistics of the whole, if every part has some."""
    paths = [Path(f"{part}{STATISTICS_SUFFIX}") for part in parts]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        logger.info("the statistics are not merged; missing: %s", ", ".join(missing))
        return None
    return merged_statistics([orjson.loads(path.read_bytes()) for path in paths])


def merged_statistics(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of parts taken together.

    Counts are added and the shares and quantiles of the edit computed anew; times, rates and memory are those
    of the parts' own jobs and left out.

    Args:
        parts: the content of each ``.stats.json``.

    Raises:
        DataFormatError: a part's statistics are not of this version.
    """
    try:
        merged: dict[str, Any] = {name: _added([part[name] for part in parts]) for name in _ADDED}
        merged["bad_lines"] = [line for part in parts for line in part["bad_lines"]][:_MAX_BAD_LINES]
        edits = [EditStatistics.from_json(part["edit"]["counts"]) for part in parts if "edit" in part]
    except (KeyError, TypeError, ValueError) as error:
        raise DataFormatError(
            f"the parts' {STATISTICS_SUFFIX} are not of this version ({error}); merge without them by "
            "moving them away"
        ) from error
    conversations = [part["conversations"]["counts"] for part in parts if "conversations" in part]
    if conversations:
        merged["conversations"] = conversation_statistics(_added(conversations))
    if edits:
        whole = EditStatistics()
        for edit in edits:
            whole.merge(edit)
        merged["edit"] = edit_statistics(whole)
        merged["environments"] = sorted({name for part in parts for name in part.get("environments", ())})
    return merged


def _added(values: Sequence[Any]) -> Any:
    """Sums of numbers, or of the numbers in mappings of one shape; what is missing in one counts as 0."""
    if isinstance(values[0], dict):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: _added([value[name] for value in values if name in value]) for name in names}
    return sum(values)
