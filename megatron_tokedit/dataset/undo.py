"""From the edited dataset and its journal back to the original.

Invariant: the result is the dataset that ``--edit-strategy none`` would have written, byte for byte (without
the documents that the job dropped whole, which are counted in its statistics).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset.journal import DROPPED, JOURNAL_SUFFIX, Journal, JournalEntries
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.dataset.verify import verify_dataset
from megatron_tokedit.dataset.writer import DatasetSummary, IndexedDatasetWriter
from megatron_tokedit.errors import DataFormatError


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
    dropped = entries.kinds == DROPPED
    num_tokens = sum(map(len, sequences)) + int(dropped.sum())
    lengths = _original_lengths(sequences, entries, num_tokens, bool(dropped.any()))
    if entries.positions[-1] >= num_tokens or sum(lengths) != num_tokens:
        raise DataFormatError(
            f"the journal's edits reach position {entries.positions[-1]} of {sum(lengths)} tokens, "
            f"the document has {num_tokens}; journal and dataset do not belong together"
        )
    kept = np.ones(num_tokens, bool)
    kept[entries.positions[dropped]] = False
    original = np.empty(num_tokens, entries.original_ids.dtype)
    if kept.any():
        original[kept] = np.concatenate(sequences)
    original[entries.positions] = entries.original_ids
    return np.split(original, np.cumsum(lengths[:-1]))


def _original_lengths(
    sequences: Sequence[npt.NDArray[np.integer]], entries: JournalEntries, num_tokens: int, any_dropped: bool
) -> list[int]:
    if len(entries.sequence_lengths):
        return [int(length) for length in entries.sequence_lengths]
    if any_dropped:
        return [num_tokens]  # the lengths of several sequences would have been recorded
    return [len(sequence) for sequence in sequences]


def undo_dataset(prefix: str, output_prefix: str) -> DatasetSummary:
    """Rebuild the original dataset of ``PREFIX`` from it and ``PREFIX.edits``.

    Raises:
        DataFormatError: a file is missing or damaged, dataset and journal do not belong together, or the
            output is the input.
    """
    if prefix == output_prefix:
        raise DataFormatError(
            f"{prefix} is both the edited dataset and the output; choose another output prefix"
        )
    verify_dataset(prefix)  # a wrong token undone would not be noticed later
    dataset = IndexedDataset(prefix)
    journal = Journal(f"{prefix}{JOURNAL_SUFFIX}")
    with IndexedDatasetWriter(output_prefix, dataset.dtype) as writer:
        for index, sequences in enumerate(dataset.iter_documents()):
            writer.add_document(undo_document(sequences, journal.entries(index)))
        return writer.finalize()
