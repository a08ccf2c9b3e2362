"""Sentencepiece models behind the :class:`Tokenizer` protocol.

Invariant: ``encode`` is ``SentencePieceProcessor.encode`` and nothing else, as in Megatron-LM: no BOS, no
EOS, and text that spells a control piece (``</s>``) is ordinary text. What the model's own normalisation
changes (a Unicode form, runs of spaces in models that squeeze them) and U+2581, which sentencepiece uses to
write a space, cannot be restored by anyone; everything else ``decode`` gives back exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_tokedit.errors import TokenizerError
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

    def __init__(self, tokenizer_model: str) -> None:
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
        pieces = sentencepiece_model_pb2.ModelProto.FromString(serialized).pieces
        self.special_ids = frozenset(i for i, piece in enumerate(pieces) if piece.type not in _TEXT_TYPES)
        self._spelled_ids = np.array(
            [i for i, piece in enumerate(pieces) if piece.type in _SPELLED_TYPES], np.int32
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the type and the model file's bytes."""
        return self._fingerprint

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no BOS, no EOS."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """``encode`` of every text; int32 arrays. One thread: workers are processes."""
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The exact text of ``ids``; control pieces are spelled out, invalid UTF-8 becomes U+FFFD."""
        parts = []
        for segment, special in split_at_ids(np.asarray(ids, np.int32), self._spelled_ids):
            parts.append(self._processor.decode(segment.tolist()))
            if special is not None:
                parts.append(self._processor.id_to_piece(special))
        return "".join(parts)


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
