"""Texts of tasks as ids: what stands before a context, and where a context ends and its continuation begins.

Invariant: the ids are those of lm-eval's model ``hf`` on the model's Hugging Face folder, whatever the
checkpoint's format: contexts and continuations are encoded together, so that the border between them is a
border between tokens where that is possible, and spaces at the end of a context belong to the continuation.
Texts of ids are those of the same folder's tokenizer, also where the bytes of ids are no UTF-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.tokenizers import Tokenizer

DocumentStart = Literal["auto", "always", "never"]
_TEXTS_AT_ONCE = 1024
_NEVER_ALONE = 0x80
"""A byte that is no character, and begins none."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A context and its continuation, both with at least one id."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class TextEncoder:
    """Encodes and decodes the texts of tasks.

    Args:
        tokenizer: the model's.
        start_id: what stood before every document in training; None: nothing.
        document_start: whether that stands before every context. ``auto``: where the tokenizer of the model's
            Hugging Face folder puts it there: a sentencepiece model's does, others say it themselves.

    Attributes:
        tokenizer: as given.
        prefix_id: the context of a text without one: the start of a document, else BOS, else EOD.
    """

    def __init__(
        self, tokenizer: Tokenizer, start_id: int | None, document_start: DocumentStart = "auto"
    ) -> None:
        self.tokenizer = tokenizer
        known = (start_id, tokenizer.bos, tokenizer.eod)
        self.prefix_id = next(i for i in known if i is not None)
        self._start_ids = tokenizer.prefix_ids
        self._hidden_ids = _hidden_ids(tokenizer)
        self._byte_of_id = _single_bytes(tokenizer)
        self._invalid_byte_id = next((i for i, byte in self._byte_of_id.items() if byte == _NEVER_ALONE), 0)
        if document_start == "never":
            self._start_ids = ()
        elif document_start == "always":
            self._start_ids = tokenizer.prefix_ids or (self.prefix_id,)
        elif start_id is not None and tokenizer.tokenizer_type == "SentencePieceTokenizer":
            self._start_ids = (start_id,)

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of texts as contexts; one that spells the start of a document has it once."""
        bare = self.encode_bare(texts)
        size = len(self._start_ids)
        return [ids if ids[:size] == self._start_ids else self._start_ids + ids for ids in bare]

    def encode_bare(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of texts alone, without anything before or after them.

        Raises:
            DataFormatError: a text that is not Unicode.
        """
        bare: list[tuple[int, ...]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = list(texts[start : start + _TEXTS_AT_ONCE])
            for text in batch:
                _refuse_surrogates(text)
            bare += [self._without_template(tuple(a.tolist())) for a in self.tokenizer.encode_batch(batch)]
        return bare

    def encode_pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair | None]:
        """Ids of contexts and continuations; None where a continuation has no ids of its own."""
        pairs: list[Pair | None] = [None] * len(texts)
        bare = [i for i, (context, _) in enumerate(texts) if not context]
        for i, ids in zip(bare, self.encode_bare([texts[i][1] for i in bare]), strict=True):
            pairs[i] = _pair((self.prefix_id, *ids[ids[:1] == (self.prefix_id,) :]), 1)
        joined = [i for i, (context, _) in enumerate(texts) if context]
        contexts = [texts[i][0].rstrip() for i in joined]
        known = dict.fromkeys(contexts)
        encoded = dict(zip(known, self.encode(list(known)), strict=True))
        wholes = self.encode([texts[i][0] + texts[i][1] for i in joined])
        for i, context, whole in zip(joined, contexts, wholes, strict=True):
            size = len(encoded[context])
            pairs[i] = _pair(whole, size) if size else _pair((self.prefix_id, *whole), 1)
        return pairs

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids alone, without control tokens.

        Where a run of pieces for single bytes is no UTF-8, each of its bytes is U+FFFD, as in transformers;
        sentencepiece keeps the whole characters in it.
        """
        shown = [i for i in ids if i not in self._hidden_ids]
        if not self._byte_of_id:
            return self.tokenizer.decode(shown)
        known: list[int] = []
        for is_byte, run in groupby(shown, key=self._byte_of_id.__contains__):
            run_ids = list(run)
            if is_byte and not _is_text(bytes(self._byte_of_id[i] for i in run_ids)):
                run_ids = [self._invalid_byte_id] * len(run_ids)
            known += run_ids
        return self.tokenizer.decode(known)

    def _without_template(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        prefix, suffix = self.tokenizer.prefix_ids, self.tokenizer.suffix_ids
        if prefix and ids[: len(prefix)] == prefix:
            ids = ids[len(prefix) :]
        if suffix and ids[-len(suffix) :] == suffix:
            ids = ids[: -len(suffix)]
        return ids


def _pair(ids: tuple[int, ...], context_size: int) -> Pair | None:
    """The ids cut in two; None: there is nothing behind the context."""
    return Pair(ids[:context_size], ids[context_size:]) if len(ids) > context_size else None


def _hidden_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Control ids; a sentencepiece model's user-defined pieces are text, as in its Hugging Face folder."""
    if tokenizer.tokenizer_type != "SentencePieceTokenizer":
        return tokenizer.special_ids
    control = tokenizer.special_ids - tokenizer.spellable_ids
    return frozenset(i for i in control if tokenizer.decode([i]).strip())


def _single_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """Ids of a sentencepiece model's pieces ``<0x00>`` to ``<0xFF>``, which follow one another."""
    if tokenizer.tokenizer_type != "SentencePieceTokenizer":
        return {}
    parts = {bytes_[0]: id_ for id_, bytes_ in tokenizer.incomplete_utf8.items()}
    if _NEVER_ALONE not in parts:
        return {}
    first = parts[_NEVER_ALONE] - _NEVER_ALONE
    return {first + byte: byte for byte in range(256)}


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataFormatError(
            f"a task's text {text[:80]!r} is not Unicode text ({error.reason}); mend the task's data"
        ) from error
