"""Long documents as overlapping windows, and windows as batches.

A window is a run of at most ``context`` tokens of one document. The model's input is the window without its
last token, with a start id (BOS) in front where the prior expects one, so an input never has more than
``context`` positions. The first ``overlap`` tokens of every window but a document's first are context only:
they were scored in the window before.

Invariant: every token of a document is scored exactly once (without a start id the very first token has no
context and is not scored); nothing is truncated; batches depend on the given documents and on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_SIMILAR = 0.95
"""A window may join a batch whose longest one is so much longer; any may join a tiny batch."""
_TINY_BATCH = 1 / 8


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``[start, stop)`` of document ``document``, of which those from ``first_scored`` on are
    scored.
    """

    document: int
    start: int
    stop: int
    first_scored: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the window."""
        return self.stop - self.start


def plan_windows(
    document: int, num_tokens: int, *, context: int, overlap: int, scored_from: int = 0
) -> Iterator[Window]:
    """Windows that cover a document, or what comes behind its first tokens.

    Args:
        document: index of the document, copied into each window.
        num_tokens: its length.
        context: tokens a window at most, >= 2.
        overlap: context-only tokens at the start of later windows, 1 <= overlap < context.
        scored_from: tokens before it are context only.
    """
    scored = scored_from
    while scored < num_tokens:
        start = 0 if num_tokens <= context else max(0, scored - overlap)
        stop = min(start + context, num_tokens)
        yield Window(document, start, stop, scored)
        scored = stop


def plan_batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Group windows of similar length so that rows x longest row stays within a token budget.

    A batch ends early, too, where the next window is much shorter and the batch is not tiny: padding costs
    more than a smaller batch does.

    Args:
        windows: in any order; the result depends on it only among windows of equal length.
        batch_tokens: budget, padding included; a window longer than it goes alone.
    """
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: -window.num_tokens):  # stable
        if batch:
            longest = batch[0].num_tokens
            is_tiny = len(batch) * longest < _TINY_BATCH * batch_tokens
            is_similar = window.num_tokens >= _SIMILAR * longest
            if (len(batch) + 1) * longest > batch_tokens or not (is_tiny or is_similar):
                yield batch
                batch = []
        batch.append(window)
    if batch:
        yield batch
