"""Words and UTF-8 bytes of documents: what perplexities of different tokenizers can be compared by.

Words are what white space separates, as ``str.split`` does; bytes are those of the whole text. lm-eval counts
the same (``re.split(r"\\s+", text)``), and one empty word more at each end of a text that begins or ends with
white space.

Invariant: the counts are the text's alone; an end-of-document token that was appended is no text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset import IndexedDataset
from megatron_tokedit.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class TextCounts:
    """Sizes of the documents of a domain, empty ones included.

    Attributes:
        num_words_D: int64 ``[D]``.
        num_bytes_D: int64 ``[D]``.
    """

    num_words_D: npt.NDArray[np.int64]
    num_bytes_D: npt.NDArray[np.int64]


def count_texts(documents: Iterable[Sequence[str]]) -> TextCounts:
    """Count documents, each given as its sequences of text; a word does not go on into the next sequence."""
    num_words, num_bytes = array("q"), array("q")
    for texts in documents:
        num_words.append(sum(len(text.split()) for text in texts))
        num_bytes.append(sum(len(text) if text.isascii() else len(text.encode()) for text in texts))
    if not num_words:
        return TextCounts(np.zeros(0, np.int64), np.zeros(0, np.int64))
    return TextCounts(np.frombuffer(num_words, np.int64), np.frombuffer(num_bytes, np.int64))


def dataset_texts(dataset: IndexedDataset, tokenizer: Tokenizer, *, append_eod: bool) -> Iterator[list[str]]:
    """The text of every document's sequences.

    Args:
        dataset: of the tokenizer's ids.
        tokenizer: decodes without loss.
        append_eod: every document ends with the end-of-document id, which is left out; elsewhere that id is
            text that spells it.
    """
    for sequences in dataset.iter_documents():
        if append_eod and sequences and sequences[-1].size and sequences[-1][-1] == tokenizer.eod:
            sequences[-1] = sequences[-1][:-1]
        yield [tokenizer.decode(ids) for ids in sequences]
