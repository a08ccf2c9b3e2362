"""Proving that a journal belongs to its dataset: that every edited document can be undone.

Works on many documents at a time, in memory that does not depend on their number.

Invariant: a journal without a fault here never makes ``undo`` fail.

Legend: ``R`` documents with edits (rows of the journal), ``E`` entries, all of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset.journal import Journal
from megatron_tokedit.dataset.journal_format import CHANGED, DROPPED, INSERTED
from megatron_tokedit.dataset.reader import IndexedDataset

_CHUNK_ITEMS = 1 << 18


def journal_faults(dataset: IndexedDataset, journal: Journal, vocab_size: int | None) -> Iterator[str]:
    """Yield what keeps the journal from being undone on the dataset; of each kind the first.

    Args:
        dataset: without faults of its own.
        journal: with a correct checksum or not.
        vocab_size: original ids must be below it, if given.
    """
    path = journal.path
    if journal.num_documents != dataset.num_documents:
        yield f"{path}: is for {journal.num_documents} documents, there are {dataset.num_documents}"
        return
    if journal.header.dtype != dataset.dtype:
        yield f"{path}: has {journal.header.dtype} ids, the dataset has {dataset.dtype}"
        return
    sections = list(_section_faults(journal))
    yield from (f"{path}: {fault}" for fault in sections)
    if sections:
        return
    seen: set[str] = set()
    for chunk in _chunks(dataset, journal):
        for document, fault in chunk.faults(vocab_size):
            if fault not in seen:
                seen.add(fault)
                yield f"{path}: document {document}: {fault}; journal and dataset do not belong together"


def _section_faults(journal: Journal) -> Iterator[str]:
    """Faults of the three columns that say which rows belong to which document."""
    header = journal.header
    if _falls(journal.column("documents"), -1, strictly=True) or (
        header.num_edited_documents and journal.column("documents")[-1] >= header.num_documents
    ):
        yield f"its document numbers do not ascend within {header.num_documents} documents"
    for name, total, strictly in (
        ("entry_ends", header.num_entries, True),
        ("length_ends", header.num_lengths, False),
    ):
        column = journal.column(name)
        last = int(column[-1]) if len(column) else 0
        if _falls(column, 0, strictly=strictly) or last != total:
            yield f"its {name} do not rise from 0 to {total}"


def _falls(column: npt.NDArray[np.int64], before: int, *, strictly: bool) -> bool:
    """Whether an item is not larger than the one before it (not ``strictly``: smaller)."""
    for start in range(0, len(column), _CHUNK_ITEMS):
        chunk = column[start : start + _CHUNK_ITEMS]
        previous = np.concatenate(([before], chunk[:-1]))
        if (chunk <= previous if strictly else chunk < previous).any():
            return True
        before = int(chunk[-1])
    return False


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some rows of the journal and what the dataset holds for them."""

    documents_R: npt.NDArray[np.int64]
    num_edited_tokens_R: npt.NDArray[np.int64]
    num_edited_sequences_R: npt.NDArray[np.int64]
    num_entries_R: npt.NDArray[np.int64]
    num_lengths_R: npt.NDArray[np.int64]
    positions_E: npt.NDArray[np.int64]
    original_ids_E: npt.NDArray[np.int64]
    kinds_E: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]

    def faults(self, vocab_size: int | None) -> Iterator[tuple[int, str]]:
        """Yield, for every kind of fault, the first document that has it."""
        row_E = np.repeat(np.arange(len(self.documents_R)), self.num_entries_R)
        inserted_E = self.kinds_E == INSERTED
        num_original_R = (
            self.num_edited_tokens_R + self._sums(self.kinds_E == DROPPED) - self._sums(inserted_E)
        )
        limit_E = num_original_R[row_E] + inserted_E
        outside_E = (self.positions_E < 0) | (self.positions_E >= limit_E)
        steps = np.diff(self.positions_E)
        unordered = (row_E[1:] == row_E[:-1]) & ((steps < 0) | ((steps == 0) & ~inserted_E[:-1]))
        alien_E = self.original_ids_E < 0
        if vocab_size is not None:
            alien_E |= self.original_ids_E >= vocab_size
        checks = (
            (row_E[~np.isin(self.kinds_E, (CHANGED, DROPPED, INSERTED))], "has an entry of no known kind"),
            (row_E[1:][unordered], "its positions do not ascend"),
            (row_E[outside_E], "its positions reach beyond the original"),
            (row_E[alien_E], f"has an original id outside the vocabulary of {vocab_size}"),
            (self._rows_of_wrong_lengths(num_original_R), "its original sequence lengths do not add up"),
        )
        for rows, fault in checks:
            if len(rows):
                yield int(self.documents_R[rows[0]]), fault

    def _sums(self, values_E: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        starts = np.cumsum(self.num_entries_R) - self.num_entries_R
        return np.add.reduceat(values_E.astype(np.int64), starts)

    def _rows_of_wrong_lengths(self, num_original_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows whose recorded lengths are negative or do not add up, or are missing."""
        ends = np.concatenate(([0], np.cumsum(self.lengths)))
        last_R = np.cumsum(self.num_lengths_R)
        sums_R = ends[last_R] - ends[last_R - self.num_lengths_R]
        negatives = np.concatenate(([0], np.cumsum(self.lengths < 0)))
        has_negative_R = negatives[last_R] > negatives[last_R - self.num_lengths_R]
        recorded_R = self.num_lengths_R > 0
        moved_R = self._sums(self.kinds_E != CHANGED) > 0
        wrong_R = recorded_R & ((sums_R != num_original_R) | has_negative_R)
        wrong_R |= ~recorded_R & moved_R & (self.num_edited_sequences_R > 1)
        return np.flatnonzero(wrong_R | (num_original_R < 0))


def _chunks(dataset: IndexedDataset, journal: Journal) -> Iterator[_Chunk]:
    column = journal.column
    entry_ends, length_ends = column("entry_ends"), column("length_ends")
    row = entry = length = 0
    while row < len(entry_ends):
        end_row = max(
            row + 1,
            min(
                int(np.searchsorted(entry_ends, entry + _CHUNK_ITEMS)),
                int(np.searchsorted(length_ends, length + _CHUNK_ITEMS, "right")),
                row + _CHUNK_ITEMS,
            ),
        )
        documents = column("documents")[row:end_row]
        first, end = dataset.document_ends[documents], dataset.document_ends[documents + 1]
        end_entry, end_length = int(entry_ends[end_row - 1]), int(length_ends[end_row - 1])
        yield _Chunk(
            documents_R=documents,
            num_edited_tokens_R=dataset.token_offsets(end) - dataset.token_offsets(first),
            num_edited_sequences_R=end - first,
            num_entries_R=np.diff(entry_ends[row:end_row], prepend=entry),
            num_lengths_R=np.diff(length_ends[row:end_row], prepend=length),
            positions_E=column("positions")[entry:end_entry].astype(np.int64),
            original_ids_E=column("original_ids")[entry:end_entry].astype(np.int64),
            kinds_E=column("kinds")[entry:end_entry],
            lengths=column("sequence_lengths")[length:end_length].astype(np.int64),
        )
        row, entry, length = end_row, end_entry, end_length
