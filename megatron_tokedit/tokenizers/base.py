"""The one tokenizer contract of the package.

Invariant: ids mean the same as in Megatron-LM's tokenizer of the same type, and ``decode`` of unedited ids
loses nothing (no whitespace clean-up).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class PlacedIds:
    """Token ids and where in the text they stand.

    Attributes:
        ids_T: int32 ``[T]``.
        starts_T: int64 ``[T]``: first character of each token.
        ends_T: int64 ``[T]``: one past its last; tokens that are parts of one character have all of it.
    """

    ids_T: npt.NDArray[np.int32]
    starts_T: npt.NDArray[np.int64]
    ends_T: npt.NDArray[np.int64]


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> token ids."""

    tokenizer_type: str
    """``SentencePieceTokenizer`` or ``HuggingFaceTokenizer`` (Megatron-LM's names)."""
    tokenizer_model: str
    """The file, folder or name it was loaded from, as given."""
    vocab_size: int
    """Number of ids: the largest id plus one."""
    eod: int
    """Id appended by ``--append-eod``."""
    bos: int | None
    """Beginning-of-sequence id, where the tokenizer has one."""
    pad: int | None
    prepends_bos: bool
    """True where a model of this tokenizer expects BOS before the first token when it scores text."""
    prefix_ids: tuple[int, ...]
    """Ids that ``encode`` itself puts before every text (a Hugging Face Llama tokenizer: its BOS); often
    empty. They are part of the dataset, as in Megatron-LM, so a scorer must not prepend BOS a second time."""
    suffix_ids: tuple[int, ...]
    """Ids that ``encode`` itself puts after every text; nearly always empty."""
    special_ids: frozenset[int]
    """Control ids (eod, bos, pad, unknown, user-defined control symbols): never edited and never sampled."""
    spellable_ids: frozenset[int]
    """The control ids that a text can spell with this tokenizer as loaded; empty where such text is split.
    The unknown id is not among them where it also stands for characters that the vocabulary lacks."""
    chat_template: str | None
    """Jinja text of the chat template that lies beside the vocabulary, where there is one."""
    special_tokens: Mapping[str, str]
    """``bos_token``, ``eos_token``, ... -> its text: what chat templates can refer to."""
    control_tokens: Mapping[str, int]
    """Text -> id of the control tokens that a chat template can write."""

    @property
    def incomplete_utf8(self) -> Mapping[int, bytes]:
        """Ids whose bytes are not whole UTF-8 characters by themselves -> those bytes.

        Ids not in it decode to whole characters, or to nothing.
        """

    @property
    def encoder(self) -> str:
        """What turns text into ids, with its version (``tokenizers 0.22.1``), for messages and statistics."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over what determines the ids: type, vocabulary, merges or model, special ids.

        The same whatever the :attr:`encoder`, and whether or not spelled control tokens are split.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, as Megatron-LM's preprocess_data.py writes them (``eod`` apart)."""

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """``encode`` of every text; int32 arrays."""

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The exact text of ``ids``, the inverse of ``encode``: its ``prefix_ids`` and ``suffix_ids`` are
        left out, all other special tokens are spelled out. Bytes that are no valid UTF-8 become U+FFFD.
        """

    def encode_chat(self, text: str, foreign: Sequence[tuple[int, int]]) -> PlacedIds:
        """Token ids of a conversation that a chat template has rendered: nothing is put before or after.

        Control tokens that the template spells become these tokens.

        Args:
            text: as rendered.
            foreign: ascending spans ``[start, stop)`` of ``text`` in which not the template but a message
                spells a control token; whether they become one is the tokenizer's own way with such text.
        """
