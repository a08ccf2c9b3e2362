"""From the sequences of a document to the id arrays that Megatron-LM's ``Encoder.encode`` would write.

Invariant: a sequence without ids leaves no trace, and ``eod`` belongs to the last sequence that has ids; a
document without ids gets no ``eod`` at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from megatron_tokedit.tokenizers.base import Tokenizer


def encode_document(tokenizer: Tokenizer, sequences: Sequence[str]) -> list[npt.NDArray[np.int32]]:
    """Encode the sequences of one document; sequences without ids are left out, as Megatron-LM does.

    Returns:
        One int32 array ``[num_tokens]`` for every sequence that has ids; no ``eod`` yet.
    """
    return encode_documents(tokenizer, [sequences])[0]


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[Sequence[str]]
) -> list[list[npt.NDArray[np.int32]]]:
    """:func:`encode_document` of many documents in one call to the tokenizer, which is faster."""
    encoded = iter(tokenizer.encode_batch([text for sequences in documents for text in sequences]))
    return [[ids for ids in islice(encoded, len(sequences)) if ids.size] for sequences in documents]


def append_eod(sequences: Sequence[npt.NDArray[np.int32]], eod: int) -> list[npt.NDArray[np.int32]]:
    """Return ``sequences`` with ``eod`` at the end of the last one; an empty document stays empty."""
    if not sequences:
        return []
    return [*sequences[:-1], np.append(sequences[-1], np.int32(eod))]
