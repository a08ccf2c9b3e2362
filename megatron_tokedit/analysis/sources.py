"""The corpora of an analysis: raw text, an indexed dataset, or the original that an edit journal gives back.

Invariant: a corpus is cut into the same parts whoever reads it, and a document's ordinal is its place in the
corpus; lines that are no document keep their ordinal and are counted. A trailing end-of-document id, and what
a tokenizer puts around every text, is no text: it is left out, so raw and indexed corpora compare.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_tokedit.analysis.blocks import Ids, Ints, TokenBlock
from megatron_tokedit.corpus import BadLine, Document, WorkUnit, expand_inputs, plan_units, read_unit
from megatron_tokedit.dataset import IndexedDataset, Journal, undo_document
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.tokenizers import Tokenizer, encode_documents

PART_TOKENS = 1 << 21
"""Tokens of an indexed corpus that one process takes at a time."""
BLOCK_TOKENS = 1 << 17
_RAW_BATCH = 256
JOURNAL_SUFFIX = ".edits"


@dataclass(frozen=True, slots=True)
class Corpus:
    """One named corpus; picklable.

    Attributes:
        name: as given.
        kind: ``raw``; ``indexed``; ``undone``: an indexed one with its edits taken back.
        paths: of the raw files, or the prefix.
        json_key: of raw JSON lines and parquet.
        parts: what one process takes at a time: documents ``[first, stop)``.
        units: of a raw corpus, one a part.
        num_documents: all of them, bad lines included.
        identity: SHA-256 (hex) of the contents (of an indexed corpus: of size, time of change and index).
        original_of: name of the corpus whose original this is.
    """

    name: str
    kind: Literal["raw", "indexed", "undone"]
    paths: tuple[str, ...]
    json_key: str
    parts: tuple[tuple[int, int], ...]
    units: tuple[WorkUnit, ...]
    num_documents: int
    identity: str
    original_of: str | None = None


def is_indexed(path: str) -> bool:
    """Whether ``PREFIX.idx`` is there for this prefix (or name of its ``.bin`` or ``.idx``)."""
    return os.path.isfile(f"{prefix_of(path)}.idx")


def prefix_of(path: str) -> str:
    """The prefix that a path names."""
    return path.removesuffix(".bin").removesuffix(".idx")


def open_raw(name: str, patterns: Sequence[str], json_key: str) -> Corpus:
    """Scan raw files.

    Raises:
        DataFormatError: a file is missing, empty or unreadable.
    """
    files, units = plan_units(expand_inputs(patterns))
    parts = tuple((unit.first_document, unit.first_document + unit.num_documents) for unit in units)
    digest = hashlib.sha256("\n".join([json_key, *(file.sha256 for file in files)]).encode())
    return Corpus(
        name,
        "raw",
        tuple(file.path for file in files),
        json_key,
        parts,
        tuple(units),
        sum(file.num_documents for file in files),
        digest.hexdigest(),
    )


def open_indexed(name: str, prefix: str, *, original_of: str | None = None) -> Corpus:
    """Open an indexed dataset, or with ``original_of`` the original of an edited one.

    Raises:
        DataFormatError: the dataset is missing, damaged or truncated.
    """
    dataset = IndexedDataset(prefix)
    dataset.refuse_truncated()
    if not dataset.num_documents:
        raise DataFormatError(f"{prefix}.idx: holds no document")
    digest = hashlib.sha256()
    suffixes = (".bin", ".idx", *((JOURNAL_SUFFIX,) if original_of else ()))
    for suffix in suffixes:
        state = os.stat(prefix + suffix)
        digest.update(f"{suffix} {state.st_size} {state.st_mtime_ns} ".encode())
    with open(f"{prefix}.idx", "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return Corpus(
        name,
        "undone" if original_of else "indexed",
        (prefix,),
        "",
        tuple(_cut(dataset)),
        (),
        dataset.num_documents,
        digest.hexdigest(),
        original_of,
    )


def _cut(dataset: IndexedDataset) -> Iterator[tuple[int, int]]:
    """Parts of about :data:`PART_TOKENS` tokens, found by bisection: no pass over the index."""

    def tokens_before(document: int) -> int:
        return int(dataset.token_offsets(dataset.document_ends[document : document + 1])[0])

    first, count = 0, dataset.num_documents
    while first < count:
        wanted = tokens_before(first) + PART_TOKENS
        stop = bisect.bisect_left(range(count + 1), wanted, lo=first + 1, hi=count, key=tokens_before)
        yield first, stop
        first = stop


def draw_documents(num_documents: int, count: int | None, seed: int) -> Ints | None:
    """Ordinals of a random sample, ascending; None: all documents. The same for corpora of one size."""
    if count is None or count >= num_documents:
        return None
    drawn = np.random.default_rng(seed).choice(num_documents, count, replace=False, shuffle=False)
    return np.sort(drawn).astype(np.int64)


def of_part(ordinals: Ints | None, part: tuple[int, int]) -> Ints | None:
    """The drawn ordinals that lie in a part."""
    if ordinals is None:
        return None
    return ordinals[np.searchsorted(ordinals, part[0]) : np.searchsorted(ordinals, part[1])]


class Reader:
    """Reads parts of corpora as token blocks.

    Args:
        tokenizer: of the ids that come out.
        stored: tokenizer of the ids of indexed corpora; where it is another, they are decoded with it, and
            the text is encoded with ``tokenizer``.
        keeps_prefix: leave what the tokenizer puts before a text (BOS) in, for a model that expects it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stored: Tokenizer | None = None, *, keeps_prefix: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.stored = stored or tokenizer
        self._keeps_prefix = keeps_prefix
        self._recodes = self.stored.fingerprint != tokenizer.fingerprint

    def read(
        self, corpus: Corpus, part: int, ordinals: Ints | None, on_bad: Callable[[BadLine], None]
    ) -> Iterator[TokenBlock]:
        """Yield the documents of a part, in order.

        Args:
            corpus: the corpus.
            part: number of the part.
            ordinals: the documents of the part that are wanted; None: all.
            on_bad: told of every line that is no document.
        """
        if corpus.kind == "raw":
            yield from self._raw(corpus, part, ordinals, on_bad)
            return
        dataset = IndexedDataset(corpus.paths[0])
        first, stop = corpus.parts[part]
        if corpus.kind == "undone" or ordinals is not None or self._recodes:
            wanted = range(first, stop) if ordinals is None else ordinals.tolist()
            yield from self._one_by_one(corpus, dataset, wanted)
        else:
            yield from self._runs(dataset, first, stop)

    def read_texts(self, corpus: Corpus, part: int, ordinals: Ints | None) -> Iterator[list[tuple[int, str]]]:
        """Yield batches of ordinals and texts of a part's documents, in order, without lines that are none.

        Args:
            corpus: the corpus.
            part: number of the part.
            ordinals: the documents of the part that are wanted; None: all.
        """
        if corpus.kind == "raw":
            documents = read_raw(corpus, part, ordinals, lambda line: None)
            while batch := list(itertools.islice(documents, _RAW_BATCH)):
                yield [(number, "\n".join(next(iter(doc.fields.values())))) for number, doc in batch]
            return
        for block in self.read(corpus, part, ordinals, lambda line: None):
            texts = [self.tokenizer.decode(ids) for ids in block.documents()]
            yield list(zip(block.ordinals_D.tolist(), texts, strict=True))

    def _runs(self, dataset: IndexedDataset, first: int, stop: int) -> Iterator[TokenBlock]:
        """Whole runs of documents that lie end to end in ``.bin``, without a step for each."""
        while first < stop:
            bounds = dataset.document_ends[first : min(stop, first + BLOCK_TOKENS) + 1].astype(np.int64)
            low = int(bounds[0])
            lengths = dataset.sequence_lengths[low : int(bounds[-1])].astype(np.int64)
            ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
            pointers = dataset.sequence_pointers[low : int(bounds[-1])]
            start = int(pointers[0]) if len(pointers) else 0
            offsets_D = ends[bounds - low]
            size = max(1, int(np.searchsorted(offsets_D, BLOCK_TOKENS, "right")) - 1)
            num_tokens = int(offsets_D[size])
            is_whole = np.array_equal(pointers, start + ends[:-1] * dataset.dtype.itemsize)
            begin = start // dataset.dtype.itemsize
            if not is_whole or begin + num_tokens > dataset.num_tokens:
                documents = [_joined(dataset.document(i)) for i in range(first, first + size)]
                yield self._trimmed(TokenBlock.of(documents, range(first, first + size)))
            else:
                ids_T = dataset.tokens[begin : begin + num_tokens].astype(np.int32)
                numbers_D = np.arange(first, first + size, dtype=np.int64)
                yield self._trimmed(TokenBlock(ids_T, offsets_D[1 : size + 1], numbers_D))
            first += size

    def _one_by_one(
        self, corpus: Corpus, dataset: IndexedDataset, wanted: Sequence[int]
    ) -> Iterator[TokenBlock]:
        """Documents that have to be looked up, undone or encoded again."""
        journal = Journal(corpus.paths[0] + JOURNAL_SUFFIX) if corpus.kind == "undone" else None
        for numbers in _batches(wanted, _RAW_BATCH):
            documents = []
            for number in numbers:
                sequences = dataset.document(number)
                if journal is not None:
                    sequences = undo_document(sequences, journal.entries(number))
                documents.append(_joined(sequences))
            if self._recodes:
                trimmed = trim(TokenBlock.of(documents), self.stored).documents()
                texts = [[self.stored.decode(ids)] for ids in trimmed]
                documents = [_joined(ids) for ids in encode_documents(self.tokenizer, texts)]
            yield self._trimmed(TokenBlock.of(documents, numbers))

    def _raw(
        self, corpus: Corpus, part: int, ordinals: Ints | None, on_bad: Callable[[BadLine], None]
    ) -> Iterator[TokenBlock]:
        waiting: list[tuple[int, Document]] = []
        for numbered in read_raw(corpus, part, ordinals, on_bad):
            waiting.append(numbered)
            if len(waiting) == _RAW_BATCH:
                yield self._encoded(waiting)
                waiting = []
        if waiting:
            yield self._encoded(waiting)

    def _encoded(self, numbered: Sequence[tuple[int, Document]]) -> TokenBlock:
        texts = [next(iter(document.fields.values())) for _, document in numbered]
        documents = [_joined(sequences) for sequences in encode_documents(self.tokenizer, texts)]
        return self._trimmed(TokenBlock.of(documents, [number for number, _ in numbered]))

    def _trimmed(self, block: TokenBlock) -> TokenBlock:
        return trim(block, self.tokenizer, keeps_prefix=self._keeps_prefix)


def read_raw(
    corpus: Corpus, part: int, ordinals: Ints | None, on_bad: Callable[[BadLine], None]
) -> Iterator[tuple[int, Document]]:
    """Yield the wanted documents of a raw corpus's part with their ordinals."""
    bad: list[BadLine] = []

    def note(line: BadLine) -> None:
        bad.append(line)
        on_bad(line)

    first = corpus.parts[part][0]
    wanted = None if ordinals is None else set(ordinals.tolist())
    for index, document in enumerate(read_unit(corpus.units[part], [corpus.json_key], on_bad=note)):
        ordinal = first + index + len(bad)
        if wanted is None or ordinal in wanted:
            yield ordinal, document


def trim(block: TokenBlock, tokenizer: Tokenizer, *, keeps_prefix: bool = False) -> TokenBlock:
    """The block without trailing end-of-document ids and what the tokenizer puts around every text."""
    ids_T, starts_D, ends_D = block.ids_T, block.starts_D, block.ends_D.copy()
    is_kept_T = np.ones(len(ids_T), bool)
    for id_ in (tokenizer.eod, *reversed(tokenizer.suffix_ids)):
        last_D = np.flatnonzero(ends_D > starts_D)
        last_D = last_D[ids_T[ends_D[last_D] - 1] == id_]
        ends_D[last_D] -= 1
        is_kept_T[ends_D[last_D]] = False
    if not keeps_prefix:
        starts_D = starts_D.copy()
        for id_ in tokenizer.prefix_ids:
            first_D = np.flatnonzero(ends_D > starts_D)
            first_D = first_D[ids_T[starts_D[first_D]] == id_]
            is_kept_T[starts_D[first_D]] = False
            starts_D[first_D] += 1
    if is_kept_T.all():
        return block
    return TokenBlock(ids_T[is_kept_T], np.cumsum(ends_D - starts_D), block.ordinals_D)


def _joined(sequences: Sequence[np.ndarray]) -> Ids:
    """The ids of one document."""
    return np.concatenate([np.empty(0, np.int32), *(ids.astype(np.int32) for ids in sequences)])


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
