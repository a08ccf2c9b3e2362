"""The loss mask beside a dataset of conversations: which tokens a model learns to write.

``PREFIX_loss_mask.bin/.idx`` is an indexed dataset of ``uint8`` with the documents and sequence lengths of
``PREFIX``; 1: the token counts in the loss (a response), 0: it is context only (a prompt, the template).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_tokedit.dataset.journal import Journal
from megatron_tokedit.dataset.journal_format import DROPPED, edited_positions
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.errors import DataFormatError

LOSS_MASK_SUFFIX = "_loss_mask"
LOSS_MASK_SUFFIXES = (f"{LOSS_MASK_SUFFIX}.bin", f"{LOSS_MASK_SUFFIX}.idx")
"""What is put behind a dataset's prefix to name the files of its mask."""
LOSS_MASK_DTYPE = np.dtype(np.uint8)


def loss_mask_prefix(prefix: str) -> str:
    """The prefix of the mask of the dataset ``prefix``."""
    return prefix + LOSS_MASK_SUFFIX


def has_loss_mask(prefix: str) -> bool:
    """Whether there is one."""
    return Path(f"{loss_mask_prefix(prefix)}.idx").exists()


def open_loss_mask(dataset: IndexedDataset) -> IndexedDataset:
    """The mask of a dataset, checked to be aligned with it.

    Raises:
        DataFormatError: there is none, or its documents, lengths or dtype are not the dataset's.
    """
    prefix = loss_mask_prefix(dataset.prefix)
    if not has_loss_mask(dataset.prefix):
        raise DataFormatError(
            f"{prefix}.idx: not there, so what of {dataset.prefix} is a response is not known; "
            "make the dataset with tools/preprocess_edit.py --format sft"
        )
    mask = IndexedDataset(prefix)
    mask.refuse_truncated()
    if mask.dtype != LOSS_MASK_DTYPE:
        raise DataFormatError(f"{prefix}: holds {mask.dtype}, a loss mask holds {LOSS_MASK_DTYPE}")
    if not np.array_equal(mask.sequence_lengths, dataset.sequence_lengths) or not np.array_equal(
        mask.document_ends, dataset.document_ends
    ):
        raise DataFormatError(
            f"{prefix}: its lengths are not those of {dataset.prefix}, so the two do not belong together; "
            "preprocess the conversations again"
        )
    return mask


def loss_mask_faults(dataset: IndexedDataset, journal: Journal | None) -> Iterator[str]:
    """Yield what is wrong with the mask of a dataset.

    Args:
        dataset: without faults of its own.
        journal: without faults of its own, if there is one.
    """
    try:
        mask = open_loss_mask(dataset)
    except DataFormatError as error:
        yield str(error)
        return
    for index, sequences in enumerate(mask.iter_documents()):
        largest = max((int(sequence.max(initial=0)) for sequence in sequences), default=0)
        if largest != 1:
            what = f"holds {largest}" if largest else "has no token that counts in the loss"
            yield f"{mask.prefix}.bin: document {index} {what}"
            return
    if journal is None:
        return
    for index in journal.column("documents").tolist():
        entries = journal.entries(index)
        places = edited_positions(entries)[entries.kinds != DROPPED]
        if not np.concatenate(mask.document(index))[places].all():
            yield f"{mask.prefix}.bin: document {index} was edited outside of its responses"
            return
