"""Two documents and how one becomes the other, in tokens or, for different tokenizers, in words.

Invariant: the segments of a comparison, put together, are the two documents; counts are those of the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt

from megatron_tokedit.cli.inspect_text import printable, span_texts, visible_change, words
from megatron_tokedit.dataset import CHANGED, DROPPED, INSERTED, JournalEntries, align
from megatron_tokedit.dataset.journal_format import edited_positions
from megatron_tokedit.tokenizers import Tokenizer

Ids = npt.NDArray[np.integer]
SpanTexts = Callable[[Ids, Sequence[int]], list[str]]
"""Ids and bounds to the texts of the spans between the bounds."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a document that is equal in both, or one replaced by the other."""

    old: str
    new: str
    changed: bool


@dataclass(slots=True)
class Counts:
    """Documents, and tokens (or words) by what became of them."""

    documents: int = 0
    different: int = 0
    original: int = 0
    edited: int = 0
    by_kind: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))
    unit: str = "tokens"

    def add(self, comparison: Comparison) -> None:
        """Count one document."""
        self.documents += 1
        self.different += comparison.differs
        self.original += len(comparison.original)
        self.edited += len(comparison.edited)
        self.unit = comparison.unit
        self.add_kinds(comparison.entries.kinds)

    def add_kinds(self, kinds: npt.NDArray[np.uint8]) -> None:
        """Count the entries of a journal."""
        self.by_kind += np.bincount(kinds, minlength=4)[:4]

    def changes(self) -> str:
        """``7 tokens changed, 2 dropped``; empty where there are none."""
        names = {CHANGED: "changed", DROPPED: "dropped", INSERTED: "inserted"}
        found = [(int(self.by_kind[kind]), name) for kind, name in names.items() if self.by_kind[kind]]
        unit = self.unit.removesuffix("s") if found and found[0][0] == 1 else self.unit
        return ", ".join(f"{number:,} {name}" for number, name in found).replace(" ", f" {unit} ", 1)

    def lengths(self) -> str:
        """``of 80,629 tokens``, or from how many to how many."""
        before = "" if self.original == self.edited else f"{self.original:,} -> "
        return f"{before}{self.edited:,} {self.unit}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two documents and how one becomes the other, in tokens or in words."""

    original: Ids
    edited: Ids
    entries: JournalEntries
    texts: tuple[SpanTexts, SpanTexts]
    unit: str = "tokens"

    @property
    def differs(self) -> bool:
        """Whether there is any difference."""
        return len(self.entries.kinds) > 0

    def segments(self) -> Iterator[Segment]:
        """The documents cut where they differ; neighbouring changes are one segment."""
        hunks = list(self._hunks())
        bounds = [[0, *chain.from_iterable(hunk[side : side + 2] for hunk in hunks)] for side in (0, 2)]
        sides = []
        for ids, texts, side in zip((self.original, self.edited), self.texts, bounds, strict=True):
            sides.append((ids, [*side, len(ids)], texts(ids, [*side, len(ids)])))
        (ids, old_bounds, old_texts), (new_ids, new_bounds, new_texts) = sides
        for index, (old, new) in enumerate(zip(old_texts, new_texts, strict=True)):
            if index % 2 == 0:
                yield Segment(printable(old), printable(new), False)
            else:
                of_both = (
                    ids[old_bounds[index] : old_bounds[index + 1]],
                    new_ids[new_bounds[index] : new_bounds[index + 1]],
                )
                yield Segment(*visible_change(old, new, of_both), True)

    def _hunks(self) -> Iterator[tuple[int, int, int, int]]:
        """Begin and end in the original and in the edited document of every run of changes."""
        begin = end = new_begin = new_end = -1
        places = edited_positions(self.entries)
        for position, place, kind in zip(
            self.entries.positions.tolist(), places.tolist(), self.entries.kinds.tolist(), strict=True
        ):
            if (position, place) != (end, new_end):
                if end >= 0:
                    yield begin, end, new_begin, new_end
                begin, new_begin = position, place
            end, new_end = position + (kind != INSERTED), place + (kind != DROPPED)
        if end >= 0:
            yield begin, end, new_begin, new_end


def compare_tokens(
    tokenizer: Tokenizer | None, original: Ids, edited: Ids, entries: JournalEntries | None = None
) -> Comparison:
    """Compare by ids of one tokenizer.

    Args:
        tokenizer: of both; None: ids are shown.
        original: ids ``[T]``.
        edited: ids ``[U]``.
        entries: how one becomes the other, where it is known.
    """
    texts = partial(span_texts, tokenizer)
    return Comparison(original, edited, entries or _aligned(original, edited), (texts, texts))


def compare_words(original: str, edited: str) -> Comparison:
    """Compare by the words of two texts."""
    both = words(original), words(edited)
    number_of = {word: number for number, word in enumerate(dict.fromkeys(chain(*both)))}
    vocabulary = list(number_of)
    ids = [np.array([number_of[word] for word in side], np.int64) for side in both]
    texts = partial(_word_spans, vocabulary)
    return Comparison(ids[0], ids[1], _aligned(*ids), (texts, texts), "words")


def _word_spans(vocabulary: Sequence[str], ids: Ids, bounds: Sequence[int]) -> list[str]:
    return ["".join(vocabulary[id_] for id_ in ids[begin:end]) for begin, end in pairwise(bounds)]


def _aligned(original: Ids, edited: Ids) -> JournalEntries:
    positions, original_ids, kinds = align(original, edited)
    return JournalEntries(positions.astype(np.int32), original_ids, kinds, np.empty(0, np.int32))
