"""The characters and the texts by which two implementations of a tokenizer are compared.

Invariant: on the sure characters the editions of Unicode that tokenizers are built with agree: what is a
letter, a digit, a space or a mark, and how characters compose.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

_NEW = (
    "61d 7fd 870-89f 8b5 8be-8d2 8d3 9fe b55 c3c c5d c77 cdd cf3 d04 d3b-d3c d81 e86 e89 e8c e8e-e93 e98 "
    "ea0 ea8-ea9 eac eba ece 166d 170d 1715-171f 1734 180f 1abf-1ace 1b4c 1b7d-1b7e 1cf2-1cf3 1cfa "
    "1df6-1df9 1dfa 20c0 2b97 2bc9 2bff 2c2f 2c5f 2e4f-2e5d 2ffc-2fff 31bb-31bf 31ef 32ff 4db6-4dbf "
    "9ff0-9fff a7ba-a7f6 a82c a9bd ab66-ab6b fbc2 fd40-fd4f fdcf fdfe-fdff 1019c 10570-105bc 10780-107ba "
    "10d24-10d27 10e80-10eff 10f46-10f50 10f70-10ff6 11070-11075 110c2 11147 111ce-111cf 1123f-11241 "
    "1133b 1145a 1145e 1145f-11461 116b8-116b9 11740-11746 11839-1183a 11900-119e4 11a34 11a47 "
    "11a84-11a85 11a99 11ab0-11abf 11b00-11b09 11d42-11d45 11d97 11f00-11fff 12f90-12ff2 1342f-13455 "
    "16a70-16ac9 16f45-16f4f 16f7f-16f87 16fe2-16ff1 187f2-187f7 18af3-1affe 1b11f-1b167 1cf00-1cfc3 "
    "1d1e9-1d1ea 1d2c0-1d2d3 1df00-1df2a 1e030-1e7fe 1e94b 1ed01-1ed3d 1f10d-1f10f 1f16c-1f16f 1f1ad "
    "1f774-1f77f 1f7d9-1f7f0 1f8b0-1f8b1 1fb00-1fbf9 2a6d7-2a6df 2b735-2b739 2ebf0-2ee5d "
)
"""Code points (hexadecimal, ranges with a hyphen) that Unicode 12 to 15.1 added or put into another class,
and those that 10 to 15.1 added and that compose with others, as the unicodedata modules of Python 3.6, 3.7
and 3.13 tell. Without the new emoji, which are neither letters, digits, spaces nor marks at any time."""
_WIDE_SCRIPTS = (
    *((0x3400, 0xA000), (0xAC00, 0xD7B0), (0xE000, 0xF900)),
    *((0x12000, 0x14700), (0x17000, 0x18B00), (0x1B000, 0x1B300), (0x20000, 0x30000)),
)
_PIECES = (
    *" \t\n\r\v\f\x1c\x85\xa0\u2003\u2028\u3000'\".,!?-_/\\<>|()[]{}#@&+=*~`^$%:;",
    *"sStTlLdDmMrReEvVaZ0189",
    *("  ", "    ", "\n\n", "\r\n", "\t\t", " \n", "\n ", "'re", "'LL", "'Ve", "don't", "123", "4567890"),
    *(" word", "Word", "camelCase", "def f(x):\n    return", "https://a.b/c?d=e", "...", "----", "\0"),
    *("\u2019s", "\u2014", "\u00e9", "e\u0301", "\u0301", "\u00bd", "\u0663", "\u0e01\u0e33", "\u05d0"),
    *("\u0915\u094d\u0937", "\u0639", "\u4f60\u597d", "\u304b\u3099", "\ud55c", "\u1112\u1161", "\u212b"),
    *("\ufb01", "\u200b", "\u200d", "\ufeff", "\ufe0f", "\ufffd", "\U0001f600", "\U00020000"),
    *("\U0001f468\u200d\U0001f469", "\U0001f1e9\U0001f1ea"),
)


def sure_characters() -> list[int]:
    """The code points, ascending, that the editions of Unicode since 11 (2018) have and treat alike.

    Those that compose with others: the editions since 9 (2016).
    """
    new = set[int]()
    for item in _NEW.split():
        first, _, last = item.partition("-")
        new.update(range(int(first, 16), int(last or first, 16) + 1))
    return [
        code
        for code in range(0x30000)
        if code not in new and unicodedata.category(chr(code)) not in ("Cn", "Cs")
    ]


def outside(codes: Sequence[int]) -> re.Pattern[str]:
    """A pattern that finds a character outside ascending ``codes``."""
    gaps = np.flatnonzero(np.diff(codes) > 1).tolist()
    firsts = [codes[0], *(codes[gap + 1] for gap in gaps)]
    lasts = [*(codes[gap] for gap in gaps), codes[-1]]
    ranges = (rf"\U{first:08x}-\U{last:08x}" for first, last in zip(firsts, lasts, strict=True))
    return re.compile(f"[^{''.join(ranges)}]")


def probe_texts(added_tokens: Sequence[str]) -> Iterator[str]:
    """Texts that tokenizers tend to disagree on."""
    yield from (
        "",
        " ",
        "a",
        " " * 5000,
        "a" * 5000,
        "7" * 3000,
        "\n" * 1000,
        " a" * 3000,
        "\u4f60" * 1000,
        "=-" * 500,
    )
    tokens = list(added_tokens)
    yield from (f"{token}a{token}{token} b {token}\n{token}\n\n{token}" for token in tokens)
    yield from (token[:-1] + token for token in tokens[:100])
    yield from (token.upper() + token.title() for token in tokens[:100])
    generator = random.Random(0)
    pieces = [*_PIECES, *tokens[:8]]
    for length in (1, 2, 3, 4, 6, 10, 30):
        yield from ("".join(generator.choices(pieces, k=length)) for _ in range(300))
    codes = [code for code in sure_characters() if not any(a <= code < b for a, b in _WIDE_SCRIPTS)]
    wide = [chr(code) for first, last in _WIDE_SCRIPTS for code in range(first, last, 61)]
    characters = iter([*map(chr, codes), *wide])
    while run := "".join(islice(characters, 64)):
        yield run
        yield "".join(f"a{c}{c}1 {c} {c}." for c in run[::2])
