"""Datasets of conversations for supervised fine-tuning: one epoch of a source, row by row.

Invariant: a row is whole conversations one after the other and then padding; position ids begin at 0 at the
start of each and of the padding, which is all that the engine needs to keep them apart. The label of a
position is the next token of its own conversation, and its weight that token's loss mask.

Legend: T positions of a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.utils import Split

from megatron_tokedit.config.sft import SftConfig
from megatron_tokedit.dataset.conversations import find_conversations
from megatron_tokedit.dataset.index_cache import IndexFolders, epoch_seed
from megatron_tokedit.dataset.loss_mask import open_loss_mask
from megatron_tokedit.dataset.packing import assign_rows, plan_rows
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.dataset.sources import SourceInfo

_PADDING_ID = 0
"""Its embedding is looked up and has no influence: nothing sees padding, and its loss does not count."""


class ConversationRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The rows of one epoch of a source."""

    def __init__(
        self,
        tokens: IndexedDataset,
        mask: IndexedDataset,
        starts: npt.NDArray[np.int64],
        sequences: npt.NDArray[np.int64],
        row_length: int,
    ) -> None:
        """Take the parts; :class:`RowIndex` makes them.

        Args:
            tokens: of the source.
            mask: its loss mask.
            starts: ``[rows + 1]``, of every row in ``sequences``.
            sequences: numbers of the conversations' sequences, row by row.
            row_length: T.
        """
        self._tokens, self._mask = tokens, mask
        self._starts, self._sequences = starts, sequences
        self._row_length = row_length

    def __len__(self) -> int:
        return len(self._starts) - 1

    def conversations(self, row: int) -> list[int]:
        """Numbers of the sequences in a row."""
        found: list[int] = self._sequences[self._starts[row] : self._starts[row + 1]].tolist()
        return found

    def documents(self, row: int) -> tuple[int, ...]:
        """The documents in a row: a document without tokens has no sequence, the others have one."""
        ends = self._tokens.document_ends
        found = np.searchsorted(ends, self.conversations(row), side="right") - 1
        return tuple(sorted(found.tolist()))

    def num_positions(self, row: int) -> int:
        """Positions of a row that are not padding."""
        numbers = self._sequences[self._starts[row] : self._starts[row + 1]]
        return int((self._tokens.sequence_lengths[numbers] - 1).sum())

    def __getitem__(self, row: int | None) -> dict[str, torch.Tensor]:
        """``tokens``, ``labels``, ``position_ids`` (int64 ``[T]``) and ``loss_mask`` (float32 ``[T]``).

        For None all is padding.
        """
        tokens_T = np.full(self._row_length, _PADDING_ID, np.int64)
        labels_T = np.full(self._row_length, _PADDING_ID, np.int64)
        mask_T = np.zeros(self._row_length, np.float32)
        positions_T = np.empty(self._row_length, np.int64)
        start = 0
        for number in [] if row is None else self.conversations(row):
            ids = self._tokens.sequence(number)
            end = start + len(ids) - 1
            tokens_T[start:end], labels_T[start:end] = ids[:-1], ids[1:]
            mask_T[start:end] = self._mask.sequence(number)[1:]
            positions_T[start:end] = np.arange(end - start)
            start = end
        positions_T[start:] = np.arange(self._row_length - start)
        return {
            "tokens": torch.from_numpy(tokens_T),
            "labels": torch.from_numpy(labels_T),
            "loss_mask": torch.from_numpy(mask_T),
            "position_ids": torch.from_numpy(positions_T),
        }


class RowIndex(IndexFolders):
    """Which conversations are in which row of which epoch, on disk; the same for every split."""

    def __init__(self, directory: Path, *, row_length: int, seed: int, sft: SftConfig) -> None:
        super().__init__(directory)
        self.row_length, self.seed, self.sft = row_length, seed, sft
        self._open: dict[str, tuple[IndexedDataset, IndexedDataset]] = {}

    def ensure_epoch(self, info: SourceInfo, epoch: int, split: Split = Split.train) -> bool:
        """Have the rows of one epoch of a source in the cache; whether they had to be made."""
        return self._ensure_epoch(info, epoch)[1]

    def epoch(self, info: SourceInfo, epoch: int, split: Split = Split.train) -> ConversationRows:
        """The rows of one epoch of a source; their index is in the cache or gets built."""
        folder, _ = self._ensure_epoch(info, epoch)
        starts = np.load(folder / "rows.npy", mmap_mode="r")
        sequences = np.load(folder / "sequences.npy", mmap_mode="r")
        return ConversationRows(*self._source(info), starts, sequences, self.row_length)

    def _ensure_epoch(self, info: SourceInfo, epoch: int) -> tuple[Path, bool]:
        seed = epoch_seed(self.seed, epoch)

        def make(folder: Path) -> None:
            found = find_conversations(self._source(info)[0], self.row_length)
            plan = plan_rows(found.lengths_N, self.row_length, packing=self.sft.packing)
            starts, numbers = assign_rows(plan, found.lengths_N, seed)
            np.save(folder / "rows.npy", starts)
            np.save(folder / "sequences.npy", found.sequences_N[numbers])

        description: list[Any] = ["conversations", info.identity, seed, self.row_length, self.sft.packing]
        return self.ensure(description, make)

    def _source(self, info: SourceInfo) -> tuple[IndexedDataset, IndexedDataset]:
        if info.prefix not in self._open:
            tokens = IndexedDataset(info.prefix)
            self._open[info.prefix] = tokens, open_loss_mask(tokens)
        return self._open[info.prefix]
