"""From the edited dataset and its journal back to the original.

Invariant: the result is the dataset that ``--edit-strategy none`` would have written with the same (output)
tokenizer, byte for byte, whatever the number of generations; without the documents that the job dropped
whole, which are counted in its statistics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset.journal import Journal
from megatron_tokedit.dataset.journal_format import (
    CHANGED,
    DROPPED,
    INSERTED,
    JOURNAL_SUFFIX,
    JournalEntries,
    edited_positions,
    entry_fault,
)
from megatron_tokedit.dataset.loss_mask import (
    LOSS_MASK_DTYPE,
    has_loss_mask,
    loss_mask_prefix,
    open_loss_mask,
)
from megatron_tokedit.dataset.manifest import Manifest, read_manifest, refuse_existing, write_manifest
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.dataset.verify import verify_dataset
from megatron_tokedit.dataset.writer import DatasetSummary, IndexedDatasetWriter
from megatron_tokedit.errors import DataFormatError

_COUNTS_OF_INPUTS = ("num_documents_in", "num_bad_lines", "num_documents_dropped")


def undo_document(
    sequences: Sequence[npt.NDArray[np.integer]], entries: JournalEntries
) -> list[npt.NDArray[np.integer]]:
    """Rebuild the original sequences of one document.

    Args:
        sequences: the edited ones, as stored.
        entries: the document's edits.

    Raises:
        DataFormatError: the edits do not belong to this document.
    """
    if not len(entries.positions):
        return list(sequences)
    num_edited = sum(map(len, sequences))
    dropped, inserted = entries.kinds == DROPPED, entries.kinds == INSERTED
    num_tokens = num_edited + int(dropped.sum()) - int(inserted.sum())
    lengths = _original_lengths(sequences, entries, num_tokens)
    fault = entry_fault(num_tokens, entries.positions, entries.kinds)
    if fault or sum(lengths) != num_tokens or min(lengths, default=0) < 0:
        raise DataFormatError(
            f"the journal's edits make {num_tokens} tokens of the document's {num_edited}, in sequences of "
            f"{sum(lengths)}{f' ({fault})' if fault else ''}; journal and dataset do not belong together"
        )
    original = np.concatenate([np.empty(0, entries.original_ids.dtype), *sequences])
    if num_edited != num_tokens or dropped.any():
        kept = np.ones(num_tokens, bool)
        kept[entries.positions[dropped]] = False
        edited, original = original, np.empty(num_tokens, original.dtype)
        original[kept] = np.delete(edited, edited_positions(entries)[inserted])
    original[entries.positions[~inserted]] = entries.original_ids[~inserted]
    return [original[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]


def _original_lengths(
    sequences: Sequence[npt.NDArray[np.integer]], entries: JournalEntries, num_tokens: int
) -> list[int]:
    if len(entries.sequence_lengths):
        return [int(length) for length in entries.sequence_lengths]
    if (entries.kinds != CHANGED).any():
        return [num_tokens] if len(sequences) <= 1 else []  # those of several would have been recorded
    return [len(sequence) for sequence in sequences]


def undo_dataset(
    prefix: str,
    output_prefix: str,
    *,
    on_bytes: Callable[[int], None] | None = None,
    on_document: Callable[[int], None] | None = None,
) -> DatasetSummary:
    """Rebuild the original of dataset ``PREFIX`` from it and ``PREFIX.edits``; with a manifest if it has one.

    Args:
        prefix: of the edited dataset.
        output_prefix: of the new one.
        on_bytes: told how many more bytes were verified, before anything is written.
        on_document: told how many more documents were written.

    Raises:
        DataFormatError: a file is missing or damaged, dataset and journal do not belong together, or the
            output is there already.
    """
    refuse_existing(output_prefix)
    path = f"{prefix}{JOURNAL_SUFFIX}"
    if not os.path.isfile(path):
        raise DataFormatError(
            f"{path}: is not there, and without a journal nothing can be undone; an unedited dataset has none"
        )
    verify_dataset(prefix, on_bytes=on_bytes)  # a wrong token undone would not be noticed later
    dataset = IndexedDataset(prefix)
    journal = Journal(path)
    checksums = _undo_loss_mask(dataset, journal, output_prefix) if has_loss_mask(prefix) else {}
    with IndexedDatasetWriter(output_prefix, dataset.dtype) as writer:
        for index, sequences in enumerate(dataset.iter_documents()):
            writer.add_document(undo_document(sequences, journal.entries(index)))
            if on_document is not None:
                on_document(1)
        summary = writer.finalize()
    if (manifest := read_manifest(prefix)) is not None:
        checksums |= {"bin": summary.bin_sha256, "idx": summary.idx_sha256}
        write_manifest(output_prefix, _unedited(manifest, summary, checksums))
    return summary


def _undo_loss_mask(dataset: IndexedDataset, journal: Journal, output_prefix: str) -> dict[str, str]:
    """Rebuild the mask of the original; returns its checksums.

    Only tokens of responses are edited, so what was changed or dropped counts in the loss.
    """
    with IndexedDatasetWriter(loss_mask_prefix(output_prefix), LOSS_MASK_DTYPE) as writer:
        for index, sequences in enumerate(open_loss_mask(dataset).iter_documents()):
            entries = journal.entries(index)
            ones = np.ones_like(entries.original_ids, LOSS_MASK_DTYPE)
            of_mask = JournalEntries(entries.positions, ones, entries.kinds, entries.sequence_lengths)
            writer.add_document(undo_document(sequences, of_mask))
        summary = writer.finalize()
    return {"loss_mask.bin": summary.bin_sha256, "loss_mask.idx": summary.idx_sha256}


def _unedited(manifest: Manifest, summary: DatasetSummary, checksums: dict[str, str]) -> Manifest:
    """The manifest of the original: the same inputs and tokenizer, its own counts, nothing of an edit."""
    of_inputs = {name: count for name, count in manifest.counts.items() if name in _COUNTS_OF_INPUTS}
    return manifest.model_copy(
        update={
            "prior_tokenizer": None,
            "seed": None,
            "edit": None,
            "prior": None,
            "counts": summary.counts() | of_inputs,
            "checksums": checksums,
        }
    )
