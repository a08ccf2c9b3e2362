"""``inspect_dataset.py diff``: what differs between an original and its edited form, token by token.

Two datasets of one tokenizer are aligned by their ids, those of different tokenizers by the words of their
text; a single edited dataset is compared with the original that its journal gives back.

Invariant: documents are compared by their number; no difference is hidden, only unchanged text far from one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from megatron_tokedit.cli.inspect_compare import (
    Comparison,
    Counts,
    Ids,
    Segment,
    compare_tokens,
    compare_words,
)
from megatron_tokedit.cli.inspect_files import add_tokenizer_arguments, document_indices, tokenizer_of
from megatron_tokedit.cli.inspect_text import (
    ADDED,
    BOLD,
    FAINT,
    PLAIN,
    REMOVED,
    Piece,
    Screen,
    add_colour_argument,
    screen,
    side_by_side,
    words,
    wrapped,
)
from megatron_tokedit.dataset import DROPPED, INSERTED, IndexedDataset, Journal, read_manifest, undo_document
from megatron_tokedit.dataset.journal_format import JOURNAL_SUFFIX
from megatron_tokedit.errors import ConfigError, DataFormatError
from megatron_tokedit.tokenizers import Tokenizer

_DEFAULT_LIMIT = 10
_DEFAULT_CONTEXT_WORDS = 12
_CHUNK_ITEMS = 1 << 20


def add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``diff``."""
    parser.add_argument(
        "--document", nargs="+", type=int, metavar="I", help="only these, whole; -1 is the last"
    )
    parser.add_argument(
        "--limit",
        type=_number,
        default=_DEFAULT_LIMIT,
        metavar="N",
        help="documents with differences to show (default: 10; 0: all)",
    )
    parser.add_argument(
        "--context",
        type=_number,
        metavar="N",
        help="words shown around a change (default: 12, or all with --document)",
    )
    parser.add_argument("--side-by-side", action="store_true", help="original left, edited right")
    add_colour_argument(parser)
    add_tokenizer_arguments(parser)


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def diff(arguments: argparse.Namespace) -> None:
    """Show documents that differ, then a line of totals.

    Raises:
        ConfigError: more than two datasets.
        DataFormatError: a dataset is damaged or has no journal, or the two differ in their documents.
    """
    if len(arguments.prefixes) > 2:
        raise ConfigError("diff takes two datasets, the original and the edited one, or the edited one alone")
    pair = _JournalPair if len(arguments.prefixes) == 1 else _DatasetPair
    _show(pair(arguments.prefixes, arguments), arguments)


class _JournalPair:
    """An edited dataset and the original that its journal gives back."""

    def __init__(self, prefixes: Sequence[str], arguments: argparse.Namespace) -> None:
        (prefix,) = prefixes
        self._edited = IndexedDataset(prefix)
        try:
            self._journal = Journal(f"{prefix}{JOURNAL_SUFFIX}")
        except DataFormatError as error:
            raise DataFormatError(f"{error}; to compare it with another: diff ORIGINAL {prefix}") from error
        if self._journal.num_documents != self._edited.num_documents:
            raise DataFormatError(
                f"{prefix} has {self._edited.num_documents} documents, its journal is for "
                f"{self._journal.num_documents}; they do not belong together"
            )
        self.num_documents = self._edited.num_documents
        self._tokenizer = tokenizer_of(arguments, read_manifest(prefix))

    def candidates(self) -> Iterable[int]:
        """Documents that may differ."""
        return (int(index) for index in self._journal.column("documents"))

    def compare(self, index: int) -> Comparison:
        """One document before and after."""
        sequences, entries = self._edited.document(index), self._journal.entries(index)
        original = undo_document(sequences, entries)
        return compare_tokens(self._tokenizer, _joined(original), _joined(sequences), entries)

    def totals(self) -> Counts:
        """Counts of the whole dataset, from the journal."""
        counts = Counts(self.num_documents, self._journal.header.num_edited_documents)
        kinds = self._journal.column("kinds")
        for start in range(0, len(kinds), _CHUNK_ITEMS):
            counts.add_kinds(kinds[start : start + _CHUNK_ITEMS])
        counts.edited = self._edited.num_tokens
        counts.original = counts.edited + int(counts.by_kind[DROPPED] - counts.by_kind[INSERTED])
        return counts


class _DatasetPair:
    """Two datasets whose documents belong together by number."""

    def __init__(self, prefixes: Sequence[str], arguments: argparse.Namespace) -> None:
        self._original, self._edited = (IndexedDataset(prefix) for prefix in prefixes)
        self.num_documents = self._original.num_documents
        if self.num_documents != self._edited.num_documents:
            raise DataFormatError(
                f"{prefixes[0]} has {self.num_documents} documents, {prefixes[1]} has "
                f"{self._edited.num_documents}: they cannot be compared by number. If documents of the "
                f"second were dropped whole, `diff {prefixes[1]}` compares the rest with its original"
            )
        manifests = [read_manifest(prefix) for prefix in prefixes]
        given = arguments.tokenizer_type or arguments.tokenizer_model
        fingerprints = {manifest.tokenizer.fingerprint for manifest in manifests if manifest}
        self._in_words = len(fingerprints) > 1 and not given
        self._tokenizers = [
            tokenizer_of(arguments, manifest or manifests[0] or manifests[1]) for manifest in manifests
        ]
        if self._in_words and None in self._tokenizers:
            raise ConfigError(
                f"{prefixes[0]} and {prefixes[1]} have different tokenizers, so their texts are compared; "
                "for that the tokenizers must be where the manifests say"
            )

    def candidates(self) -> Iterable[int]:
        """Documents that may differ."""
        return range(self.num_documents)

    def compare(self, index: int) -> Comparison:
        """One document of both."""
        original, edited = self._original.document(index), self._edited.document(index)
        if not self._in_words:
            return compare_tokens(self._tokenizers[0], _joined(original), _joined(edited))
        texts = [
            _text(tokenizer, sequences)
            for tokenizer, sequences in zip(self._tokenizers, (original, edited), strict=True)
            if tokenizer is not None
        ]
        return compare_words(*texts)

    def totals(self) -> None:
        """Not known without comparing every document."""


def _joined(sequences: Sequence[Ids]) -> Ids:
    return np.concatenate([np.empty(0, np.int32), *sequences])


def _text(tokenizer: Tokenizer, sequences: Sequence[Ids]) -> str:
    """The text of a document, a line a sequence, without the end-of-document id, which every tokenizer spells
    in its own way.
    """
    return "\n".join(tokenizer.decode(ids[ids != tokenizer.eod]) for ids in sequences)


def _show(pair: _JournalPair | _DatasetPair, arguments: argparse.Namespace) -> None:
    on = screen(arguments.color)
    shown_counts = Counts()
    chosen = document_indices(arguments.document, pair.num_documents)
    context = arguments.context
    if context is None and chosen is None:
        context = _DEFAULT_CONTEXT_WORDS
    for index in pair.candidates() if chosen is None else chosen:
        comparison = pair.compare(index)
        shown_counts.add(comparison)
        if not comparison.differs and chosen is None:
            continue
        _show_document(comparison, index, pair.num_documents, context, arguments.side_by_side, on)
        if chosen is None and shown_counts.different == arguments.limit:
            break
    _show_totals(pair, shown_counts, chosen is not None, arguments.limit, on)


def _show_document(
    comparison: Comparison, index: int, num_documents: int, context: int | None, two_columns: bool, on: Screen
) -> None:
    counts = Counts()
    counts.add(comparison)
    changes = counts.changes() or "no difference"
    print(on.paint(BOLD, f"document {index} of {num_documents:,}") + f": {counts.lengths()}; {changes}")
    shortened = _shortened(list(comparison.segments()), context)
    rows = [_row(segment, is_first=number == 0) for number, segment in enumerate(shortened)]
    if two_columns:
        lines = side_by_side(rows, on)
    else:
        lines = wrapped((piece for row in rows for piece in _inline(row)), on)
    print("\n".join(lines), end="\n\n")


Row = tuple[list[Piece], list[Piece]]


def _row(segment: Segment | None, *, is_first: bool) -> Row:
    """What stands left and right; None: something left out."""
    if segment is None:
        left_out = [(FAINT, "..." if is_first else " ...")]
        return left_out, left_out
    if not segment.changed:
        return [(PLAIN, segment.new)], [(PLAIN, segment.new)]
    return [(REMOVED, segment.old)] * bool(segment.old), [(ADDED, segment.new)] * bool(segment.new)


def _inline(row: Row) -> list[Piece]:
    left, right = row
    return left if left == right else left + right


def _shortened(segments: Sequence[Segment], context: int | None) -> Iterator[Segment | None]:
    """Segments without the unchanged words that are further than ``context`` from a change; None for them."""
    for number, segment in enumerate(segments):
        if segment.changed or context is None:
            yield segment
            continue
        unchanged = words(segment.new)
        head = context if number > 0 else 0
        tail = context if number < len(segments) - 1 else 0
        if len(unchanged) <= head + tail + 1:
            yield segment
            continue
        if head:
            yield Segment("", "".join(unchanged[:head]), False)
        yield None
        if tail:
            yield Segment("", "".join(unchanged[-tail:]), False)


def _show_totals(
    pair: _JournalPair | _DatasetPair, shown: Counts, chosen: bool, limit: int, on: Screen
) -> None:
    """The last line: of everything, of the chosen documents, or of those up to the limit."""
    stopped = not chosen and 0 < limit == shown.different
    totals = None if chosen else pair.totals()
    counts = totals or shown
    changes = f"; {counts.changes()}" if counts.different else ""
    first = "the first " if stopped and totals is None else ""
    text = (
        f"{counts.different:,} of {first}{counts.documents:,} documents differ; {counts.lengths()}{changes}"
    )
    print(on.paint(BOLD, text))
    if stopped and (totals is None or totals.different > limit):
        print(f"stopped after {limit} that differ; --limit 0 shows all")
