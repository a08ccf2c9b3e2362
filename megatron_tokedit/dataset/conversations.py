"""What a dataset of conversations holds for fine-tuning: which can be learned from, in how many rows.

A conversation of n tokens takes n - 1 positions of a row: its last token is predicted and predicts nothing.
Invariant: every conversation of a source is in the rows, or counted among those that are left out; without a
word none is left out, and none is ever cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_tokedit.config.sft import SftConfig
from megatron_tokedit.dataset.loss_mask import open_loss_mask
from megatron_tokedit.dataset.packing import Lengths, plan_rows
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.errors import DataFormatError

_SHOWN_DOCUMENTS = 8


@dataclass(frozen=True, slots=True)
class ConversationCounts:
    """One source's conversations.

    Attributes:
        num_conversations: that are in the rows.
        num_tokens: of them.
        num_positions: that they take in the rows.
        num_response_tokens: of them that count in the loss.
        num_rows: of one epoch.
        row_length: positions of a row, padding included.
        num_too_long: left out.
        num_without_response: left out.
    """

    num_conversations: int
    num_tokens: int
    num_positions: int
    num_response_tokens: int
    num_rows: int
    row_length: int
    num_too_long: int = 0
    num_without_response: int = 0

    @property
    def efficiency(self) -> float:
        """Share of the rows' positions that are not padding."""
        return self.num_positions / (self.num_rows * self.row_length)


@dataclass(frozen=True, slots=True)
class Conversations:
    """The conversations of a source that are in its rows.

    Attributes:
        sequences_N: numbers of their sequences in the dataset.
        lengths_N: positions that they take in a row.
        num_response_tokens: that count in the loss.
        too_long: documents that are left out.
        without_response: documents that are left out.
        num_documents: of the dataset.
    """

    sequences_N: npt.NDArray[np.int64]
    lengths_N: Lengths
    num_response_tokens: int
    too_long: npt.NDArray[np.int64]
    without_response: npt.NDArray[np.int64]
    num_documents: int


def find_conversations(dataset: IndexedDataset, row_length: int) -> Conversations:
    """Read all lengths, and the whole loss mask once.

    Raises:
        DataFormatError: there is no loss mask, it does not belong to the dataset, or it holds other values
            than 0 and 1; or a document has several sequences.
    """
    mask = open_loss_mask(dataset)
    sizes = np.diff(dataset.document_ends)
    if len(sizes) and sizes.max() > 1:
        document = int(np.flatnonzero(sizes > 1)[0])
        raise DataFormatError(
            f"{dataset.prefix}: document {document} has {sizes[document]} sequences, and a conversation is "
            f"one; make the dataset with tools/preprocess_edit.py --format sft"
        )
    documents = np.flatnonzero(sizes == 1)
    tokens = dataset.sequence_lengths.astype(np.int64)
    responses = _response_tokens(mask)
    positions = tokens - 1
    too_long = positions > row_length
    silent = ((responses == 0) | (positions < 1)) & ~too_long
    kept = np.flatnonzero(~(too_long | silent))
    return Conversations(
        sequences_N=kept,
        lengths_N=positions[kept],
        num_response_tokens=int(responses[kept].sum()),
        too_long=documents[too_long],
        without_response=np.sort(np.concatenate([documents[silent], np.flatnonzero(sizes == 0)])),
        num_documents=dataset.num_documents,
    )


def _response_tokens(mask: IndexedDataset) -> npt.NDArray[np.int64]:
    """Tokens of every sequence that count in the loss; its first token is never predicted."""
    starts = mask.token_offsets(np.arange(mask.num_sequences, dtype=np.int64))
    if not len(starts):
        return np.zeros(0, np.int64)
    if int(mask.tokens.max()) > 1:
        raise DataFormatError(f"{mask.prefix}: holds {mask.tokens.max()}, and a loss mask is 0 or 1")
    counts: npt.NDArray[np.int64] = np.add.reduceat(mask.tokens, starts, dtype=np.int64)
    return counts - mask.tokens[starts]


def count_conversations(dataset: IndexedDataset, row_length: int, sft: SftConfig) -> ConversationCounts:
    """Count what will be trained on, as the settings say.

    Raises:
        DataFormatError: as :func:`find_conversations`; or conversations are too long or without a response
            and may not be left out, or none is left.
    """
    found = find_conversations(dataset, row_length)
    if faults := list(_faults(dataset, found, row_length, sft)):
        raise DataFormatError("; ".join(faults))
    if not len(found.sequences_N):
        raise DataFormatError(
            f"{dataset.prefix}: of {found.num_documents} conversations {len(found.too_long)} are too long "
            f"and {len(found.without_response)} have no token that counts in the loss; none is left"
        )
    num_positions = int(found.lengths_N.sum())
    return ConversationCounts(
        num_conversations=len(found.sequences_N),
        num_tokens=num_positions + len(found.sequences_N),
        num_positions=num_positions,
        num_response_tokens=found.num_response_tokens,
        num_rows=plan_rows(found.lengths_N, row_length, packing=sft.packing).num_rows,
        row_length=row_length,
        num_too_long=len(found.too_long),
        num_without_response=len(found.without_response),
    )


def _faults(dataset: IndexedDataset, found: Conversations, row_length: int, sft: SftConfig) -> Iterator[str]:
    of_all = f"of {found.num_documents:,} conversations"
    if len(found.too_long) and sft.too_long == "error":
        sizes = [sum(map(len, dataset.document(int(document)))) for document in found.too_long]
        yield (
            f"{dataset.prefix}: {len(found.too_long):,} {of_all} have more than model.seq_length + 1 = "
            f"{row_length + 1} tokens ({_documents(found.too_long)}; the longest has {max(sizes):,}): raise "
            f"model.seq_length, or leave them out with sft.too_long: drop"
        )
    if len(found.without_response) and sft.without_response == "error":
        yield (
            f"{dataset.prefix}: {len(found.without_response):,} {of_all} have no token that counts in the "
            f"loss ({_documents(found.without_response)}): look at them with tools/inspect_dataset.py show, "
            f"or leave them out with sft.without_response: drop"
        )


def _documents(numbers: npt.NDArray[np.int64]) -> str:
    """``documents 3, 8 and 5 more``."""
    more = f" and {len(numbers) - _SHOWN_DOCUMENTS:,} more" if len(numbers) > _SHOWN_DOCUMENTS else ""
    plural = "s" if len(numbers) > 1 else ""
    return f"document{plural} {', '.join(map(str, numbers[:_SHOWN_DOCUMENTS].tolist()))}{more}"
