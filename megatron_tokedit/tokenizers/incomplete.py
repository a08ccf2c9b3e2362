"""Which ids of a vocabulary stand for a piece of a character only, and for which bytes.

Byte-level vocabularies (GPT-2, Llama 3, Qwen) cut rare characters into several ids, vocabularies with byte
fallback (Llama 2, Mistral) write them as pieces ``<0xE4>``, one a byte. Invariant: in a row of ids, the bytes
given here, put together with any whole characters for all other ids, are valid UTF-8 exactly where decoding
the row loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[int, int]:
    """Code point -> byte of GPT-2's alphabet: printable Latin-1 is itself, other bytes are U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + index: byte for index, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()
_NOT_BYTE_LEVEL = re.compile("[^" + re.escape("".join(map(chr, _ALPHABET))) + "]")


def incomplete_byte_level(pieces: Iterable[tuple[str, int]]) -> dict[int, bytes]:
    """Ids of a byte-level vocabulary whose bytes are not whole characters -> their bytes.

    Args:
        pieces: (piece, id). A piece with a character outside the byte alphabet is literal text.
    """
    incomplete = {}
    for piece, id_ in pieces:
        if piece.isascii() or _NOT_BYTE_LEVEL.search(piece):
            continue
        bytes_ = piece.translate(_ALPHABET).encode("latin-1")
        try:
            bytes_.decode()
        except UnicodeDecodeError:
            incomplete[id_] = bytes_
    return incomplete


def incomplete_byte_fallback(pieces: Iterable[tuple[str, int]]) -> dict[int, bytes]:
    """Ids of the pieces ``<0x80>`` to ``<0xFF>`` -> their byte; the lower ones are whole characters."""
    incomplete = {}
    for piece, id_ in pieces:
        match = _BYTE_PIECE.fullmatch(piece)
        if match and int(match[1], 16) >= 0x80:
            incomplete[id_] = bytes([int(match[1], 16)])
    return incomplete
