"""Ids into text while they come: nothing is shown that a later id could change.

A character may be spread over several ids, and an id's text may depend on the id before it (a sentencepiece
model's first space). Invariant: the parts, put together, are the tokenizer's ``decode`` of all ids wherever
their bytes are valid UTF-8; bytes that are not become U+FFFD as soon as that is certain.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from megatron_tokedit.tokenizers import Tokenizer


class TextStream:
    """The text of ids that come one by one.

    Args:
        tokenizer: of the ids.
        context: ids that stand before the first one; their text is not shown.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer: Any = tokenizer
        self._incomplete = tokenizer.incomplete_utf8
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        # the last id of whole characters says how the next one is to be read; bytes say nothing of it
        whole = [i for i in context[-8:] if i not in self._incomplete]
        self._before: int | None = whole[-1] if whole else (context[-1] if context else None)

    def push(self, id_: int) -> str:
        """The text that is certain with one more id, often empty within a character."""
        if id_ in self._incomplete:
            if self._before is None:
                self._before = id_
            return self._bytes.decode(self._incomplete[id_])
        text = self.flush() + _text_after(self._tokenizer, self._before, id_)
        self._before = id_
        return text

    def flush(self) -> str:
        """What remains of an unfinished character: U+FFFD, or nothing."""
        return self._bytes.decode(b"", final=True)


def token_texts(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> list[str]:
    """What each id alone adds to a text, for show; parts of characters are U+FFFD."""
    known: Any = tokenizer
    befores = [*context[-1:], *ids] if context else [None, *ids]
    return [_text_after(known, before, id_) for before, id_ in zip(befores, ids, strict=False)]


@lru_cache(maxsize=1 << 16)
def _text_after(tokenizer: Any, before: int | None, id_: int) -> str:
    if before is None:
        return str(tokenizer.decode([id_]))
    return str(tokenizer.decode([before, id_])[len(tokenizer.decode([before])) :])


def first_stop(text: str, start: int, stops: Sequence[str]) -> int | None:
    """Where the first of some texts begins that ends behind ``start``; None: none does."""
    found = [text.find(stop, max(0, start - len(stop) + 1)) for stop in stops]
    return min((place for place in found if place >= 0), default=None)


def certain_length(text: str, stops: Sequence[str]) -> int:
    """Characters of a text that stay, whatever follows: its end may be the beginning of a stop text."""
    held = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:length]):
                held = length
                break
    return len(text) - held
