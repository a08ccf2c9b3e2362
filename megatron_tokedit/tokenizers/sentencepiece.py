"""Sentencepiece models behind the :class:`Tokenizer` protocol.

Invariant: ``encode`` is ``SentencePieceProcessor.encode`` and nothing else, as in Megatron-LM: no BOS, no
EOS, and text that spells a control piece (``</s>``) is ordinary text. What the model's own normalisation
changes (a Unicode form, runs of spaces in models that squeeze them) and U+2581, which sentencepiece uses to
write a space, cannot be restored by anyone; everything else ``decode`` gives back exactly. Text that spells a
user-defined piece becomes that piece, unless the tokenizer is loaded to split it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_tokedit.errors import TokenizerError
from megatron_tokedit.tokenizers.incomplete import incomplete_byte_fallback
from megatron_tokedit.tokenizers.segments import split_at_ids

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_TEXT_TYPES = (_Piece.NORMAL, _Piece.BYTE)
_SPELLED_TYPES = (
    _Piece.CONTROL,
    _Piece.UNKNOWN,
    _Piece.UNUSED,
)  # sentencepiece decodes these to nothing or " ?? "


class SentencePieceTokenizer:
    """A sentencepiece model file; see :class:`megatron_tokedit.tokenizers.base.Tokenizer` for the members."""

    tokenizer_type = "SentencePieceTokenizer"
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer_model: str, *, split_special_tokens: bool = False) -> None:
        """Load a ``.model`` file, or ``tokenizer.model`` of a folder.

        Raises:
            TokenizerError: the file is missing, is not a sentencepiece model, or has no EOS piece.
        """
        self.tokenizer_model = tokenizer_model
        serialized = _read_model(tokenizer_model)
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(serialized)
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{tokenizer_model} is not a sentencepiece model: {error}") from error
        if processor.eos_id() < 0:
            raise TokenizerError(
                f"{tokenizer_model} has no EOS piece, which Megatron-LM appends as end of document; "
                "train the model with an eos_id"
            )
        self._processor = processor
        self._fingerprint = hashlib.sha256(b"SentencePieceTokenizer\0" + serialized).hexdigest()
        self.vocab_size: int = processor.get_piece_size()
        self.eod: int = processor.eos_id()
        self.bos: int | None = processor.bos_id() if processor.bos_id() >= 0 else None
        self.pad: int | None = processor.pad_id() if processor.pad_id() >= 0 else None
        self.prepends_bos = self.bos is not None
        model = sentencepiece_model_pb2.ModelProto.FromString(serialized)
        self.special_ids = frozenset(
            i for i, piece in enumerate(model.pieces) if piece.type not in _TEXT_TYPES
        )
        self._spelled_ids = np.array(
            [i for i, piece in enumerate(model.pieces) if piece.type in _SPELLED_TYPES], np.int32
        )
        spellable = _spellable_ids(model)
        self.spellable_ids = frozenset[int]() if split_special_tokens else spellable
        self._encoding = (
            _splitting_processor(model, spellable) if split_special_tokens and spellable else processor
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the type and the model file's bytes."""
        return self._fingerprint

    @cached_property
    def incomplete_utf8(self) -> Mapping[int, bytes]:
        """The pieces of byte fallback that are parts of a character -> their byte."""
        ids = range(self.vocab_size)
        return incomplete_byte_fallback(
            (self._processor.id_to_piece(i), i) for i in ids if self._processor.is_byte(i)
        )

    @property
    def encoder(self) -> str:
        """Name and version of the library."""
        return f"sentencepiece {sentencepiece.__version__}"

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no BOS, no EOS."""
        ids: list[int] = self._encoding.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """``encode`` of every text; int32 arrays. One thread: workers are processes."""
        return [np.array(ids, np.int32) for ids in self._encoding.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The exact text of ``ids``; control pieces are spelled out, invalid UTF-8 becomes U+FFFD."""
        parts = []
        for segment, special in split_at_ids(np.asarray(ids, np.int32), self._spelled_ids):
            parts.append(self._processor.decode(segment.tolist()))
            if special is not None:
                parts.append(self._processor.id_to_piece(special))
        return "".join(parts)


def _spellable_ids(model: Any) -> frozenset[int]:
    """User-defined pieces but those of white space, which are ordinary text to everybody."""
    return frozenset(
        i
        for i, piece in enumerate(model.pieces)
        if piece.type == _Piece.USER_DEFINED and piece.piece.replace("\u2581", " ").strip()
    )


def _splitting_processor(model: Any, spellable_ids: frozenset[int]) -> Any:
    """A processor to which these pieces are control pieces, which no text spells; ids stay what they are."""
    splitting = sentencepiece_model_pb2.ModelProto()
    splitting.CopyFrom(model)
    for i in spellable_ids:
        splitting.pieces[i].type = _Piece.CONTROL
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(splitting.SerializeToString())
    return processor


def _read_model(tokenizer_model: str) -> bytes:
    path = Path(tokenizer_model)
    if path.is_dir():
        path = path / "tokenizer.model"
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"cannot read the sentencepiece model {path}: {error.strerror}; "
            "--tokenizer-model takes a .model file or a folder that holds tokenizer.model"
        ) from error
