"""Sentencepiece models behind the :class:`Tokenizer` protocol.

Invariant: ``encode`` is ``SentencePieceProcessor.encode`` and nothing else, as in Megatron-LM: no BOS, no
EOS, and text that spells a control piece (``</s>``) is ordinary text. What the model's own normalisation
changes (a Unicode form, runs of spaces in models that squeeze them) and U+2581, which sentencepiece uses to
write a space, cannot be restored by anyone; everything else ``decode`` gives back exactly. Text that spells a
user-defined piece becomes that piece, unless the tokenizer is loaded to split it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

from megatron_tokedit.errors import TokenizerError
from megatron_tokedit.tokenizers.base import PlacedIds
from megatron_tokedit.tokenizers.incomplete import incomplete_byte_fallback
from megatron_tokedit.tokenizers.segments import split_at_ids, widened

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
        self.chat_template = _chat_template(tokenizer_model)
        self.special_tokens: Mapping[str, str] = _special_tokens(processor)
        spellable = _spellable_ids(model)
        self.control_tokens: Mapping[str, int] = {
            piece.piece: i
            for i, piece in enumerate(model.pieces)
            if piece.type == _Piece.CONTROL or i in spellable
        }
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

    def encode_chat(self, text: str, foreign: Sequence[tuple[int, int]]) -> PlacedIds:
        """Control pieces (``</s>``) that the template spells become these pieces, and the text between them
        is encoded on its own; spelled in a message they stay ordinary text, as everywhere else.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for match in self._control_pattern.finditer(text):
            if any(start < match.end() and match.start() < stop for start, stop in foreign):
                continue
            self._encode_segment(text, position, match.start(), ids, offsets)
            ids.append(self.control_tokens[match[0]])
            offsets.append(match.span())
            position = match.end()
        self._encode_segment(text, position, len(text), ids, offsets)
        starts_T, ends_T = np.array(offsets, np.int64).reshape(-1, 2).T
        return PlacedIds(np.array(ids, np.int32), starts_T, widened(starts_T, ends_T))

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        """Control pieces that plain encoding makes ordinary text; the longest first."""
        pieces = [piece for piece, i in self.control_tokens.items() if i not in self.spellable_ids]
        return re.compile("|".join(map(re.escape, sorted(pieces, key=len, reverse=True))) or "(?!)")

    def _encode_segment(
        self, text: str, start: int, stop: int, ids: list[int], offsets: list[tuple[int, int]]
    ) -> None:
        """Add the ids and places of a stretch of text."""
        segment = text[start:stop]
        if not segment:
            return
        encoded = self._encoding.encode(segment, out_type="serialized_proto")
        pieces = sentencepiece_pb2.SentencePieceText.FromString(encoded).pieces
        character_of = _character_of_byte(segment)
        ids += [piece.id for piece in pieces]
        offsets += [(start + character_of(piece.begin), start + character_of(piece.end)) for piece in pieces]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The exact text of ``ids``; control pieces are spelled out, invalid UTF-8 becomes U+FFFD."""
        parts = []
        for segment, special in split_at_ids(np.asarray(ids, np.int32), self._spelled_ids):
            parts.append(self._processor.decode(segment.tolist()))
            if special is not None:
                parts.append(self._processor.id_to_piece(special))
        return "".join(parts)


def _character_of_byte(text: str) -> Callable[[int], int]:
    """From a place in the UTF-8 bytes of a text to that in its characters."""
    if text.isascii():
        return int
    firsts = np.cumsum([0, *(len(character.encode()) for character in text)])
    return lambda position: int(np.searchsorted(firsts, position))


def _special_tokens(processor: Any) -> dict[str, str]:
    """Special tokens of a model under the names that chat templates use."""
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
        "pad_token": processor.pad_id(),
    }
    return {name: processor.id_to_piece(i) for name, i in ids.items() if i >= 0}


def _chat_template(tokenizer_model: str) -> str | None:
    """The chat template in the model's folder: ``chat_template.jinja``, or in ``tokenizer_config.json``."""
    path = Path(tokenizer_model)
    folder = path if path.is_dir() else path.parent
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except OSError:
        pass
    try:
        template = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return template if isinstance(template, str) else None


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
