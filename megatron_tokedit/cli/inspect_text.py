"""How tokens and their differences look on a screen: text of spans, colours, lines that fit.

Invariant: text that is not marked as changed is shown as it is, but for control characters, which are spelled
out, so that no document can steer a terminal.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tokedit.tokenizers import Tokenizer

PLAIN, REMOVED, ADDED, FAINT, BOLD = "plain", "removed", "added", "faint", "bold"
Piece = tuple[str, str]
"""A style and a text."""
_CODES = {REMOVED: "31;9", ADDED: "32", FAINT: "2", BOLD: "1"}
_MARKS = {REMOVED: ("[-", "-]"), ADDED: ("{+", "+}")}
_CONTEXT_TOKENS = 4
"""Tokens before a span that are decoded with it: a tokenizer may write its first token differently."""
_WORD = re.compile(r"\n|[^\S\n]*\S+|[^\S\n]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_FALLBACK_COLUMNS = 120


@dataclass(frozen=True, slots=True)
class Screen:
    """Where and how to write.

    Attributes:
        colour: colours instead of marks.
        num_columns: width to wrap at; None: lines are left as long as they are.
    """

    colour: bool
    num_columns: int | None

    def paint(self, style: str, text: str) -> str:
        """``text`` in colour, or as it is."""
        if not self.colour or style == PLAIN or not text:
            return text
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m"

    def marked(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Pieces ready for :meth:`paint`: where there is no colour, changes in git's word-diff marks."""
        for style, text in pieces:
            if self.colour or style not in _MARKS:
                yield style, text
            else:
                before, after = _MARKS[style]
                yield PLAIN, f"{before}{text}{after}"


def add_colour_argument(parser: Any) -> None:
    """Add ``--color``."""
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="default: on a terminal"
    )


def screen(color: str) -> Screen:
    """What stdout is: ``auto`` colours a terminal, unless NO_COLOR is set or it is a dumb one."""
    terminal = sys.stdout.isatty()
    able = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    columns = shutil.get_terminal_size((_FALLBACK_COLUMNS, 24)).columns if terminal else None
    return Screen(color == "always" or (color == "auto" and able), columns)


def span_texts(tokenizer: Tokenizer | None, ids: npt.NDArray[np.integer], bounds: Sequence[int]) -> list[str]:
    """Texts of the spans between consecutive bounds; they make up the text of the whole.

    Bytes of a character that is cut in two by a bound become U+FFFD before it. Without a tokenizer: the ids.
    """
    if tokenizer is None:
        return ["".join(f" {id_}" for id_ in ids[begin:end]) for begin, end in pairwise(bounds)]
    texts = []
    for begin, end in pairwise(bounds):
        context = max(0, begin - _CONTEXT_TOKENS)
        before, whole = tokenizer.decode(ids[context:begin]), tokenizer.decode(ids[context:end])
        texts.append(_without_start(whole, before) if end > begin else "")
    return texts


def _without_start(text: str, start: str) -> str:
    """``text`` from where it is no longer ``start``, which may end in a U+FFFD that ``text`` completes."""
    length = len(start)
    while not text.startswith(start[:length]):
        length -= 1
    return text[length:]


def printable(text: str) -> str:
    """``text`` with control characters spelled out, line ends and tabs left."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def visible_change(old: str, new: str, ids: tuple[npt.NDArray[np.integer], ...]) -> tuple[str, str]:
    """Spell two texts of a change so that the eye can tell them apart.

    Line ends and tabs are spelled out, spaces too where nothing else differs; ids are given where the texts
    are equal or show nothing.

    Args:
        old: what was removed.
        new: what was added.
        ids: of both.
    """
    spaces = old.strip(" ") == new.strip(" ")
    shown = []
    for text, tokens in zip((old, new), ids, strict=True):
        seen = "".join(_ESCAPES.get(character, character) for character in text)
        if spaces or not text.strip(" "):
            seen = seen.replace(" ", "\u00b7")
        if len(tokens) and (old == new or not text):
            seen += f"<{' '.join(map(str, tokens.tolist()))}>"
        shown.append(printable(seen))
    return shown[0], shown[1]


def words(text: str) -> list[str]:
    """Line ends, and words with the space before them; together they are the text."""
    return _WORD.findall(text)


def num_cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


class Column:
    """Lines of styled words, as wide as they may be."""

    def __init__(self, num_columns: int | None) -> None:
        """Start with one empty line."""
        self.lines: list[list[Piece]] = [[]]
        self._limit = num_columns
        self._used = 0

    def fits(self, word: str) -> bool:
        """Whether a word fits on the line."""
        return self._limit is None or self._used + num_cells(word) <= self._limit

    def new_line(self) -> None:
        """Begin another line."""
        self.lines.append([])
        self._used = 0

    def add(self, style: str, word: str) -> None:
        """Put a word on the line, or on the next one; a word wider than a line is cut."""
        if not self.fits(word) and self._used:
            self.new_line()
            word = word.lstrip(" ")
        while not self.fits(word):
            cut = next(n for n in range(len(word), 0, -1) if n == 1 or self.fits(word[:n]))
            if cut == len(word):
                break
            self.lines[-1].append((style, word[:cut]))
            self.new_line()
            word = word[cut:]
        self.lines[-1].append((style, word))
        self._used += num_cells(word)

    def width(self, line: int) -> int:
        """Columns that a line takes."""
        return sum(num_cells(text) for _, text in self.lines[line])


def wrapped(pieces: Iterable[Piece], on: Screen) -> list[str]:
    """Lines of a running text."""
    column = Column(on.num_columns)
    for style, text in on.marked(pieces):
        for word in words(text):
            if word == "\n":
                column.new_line()
            else:
                column.add(style, word)
    return ["".join(on.paint(style, text) for style, text in _joined(line)) for line in column.lines]


def side_by_side(rows: Iterable[tuple[list[Piece], list[Piece]]], on: Screen) -> list[str]:
    """Lines of two columns; what is in one row of ``rows`` begins on the same line in both."""
    half = max(((on.num_columns or _FALLBACK_COLUMNS) - 3) // 2, 10)
    left, right = Column(half), Column(half)
    for old, new in rows:
        if old == new:
            for style, text in old:
                for word in words(text):
                    if word == "\n" or not (left.fits(word) and right.fits(word)):
                        left.new_line()
                        right.new_line()
                    if word != "\n":
                        left.add(style, word if left.lines[-1] else word.lstrip(" "))
                        right.add(style, word if right.lines[-1] else word.lstrip(" "))
                    _level(left, right)
        else:
            for column, pieces in ((left, old), (right, new)):
                for style, text in on.marked(pieces):
                    for word in words(text):
                        column.add(style, word)
            _level(left, right)
    return [_row(left, right, line, half, on) for line in range(len(left.lines))]


def _level(left: Column, right: Column) -> None:
    """Bring the shorter of two columns to the last line of the other."""
    while len(left.lines) < len(right.lines):
        left.new_line()
    while len(right.lines) < len(left.lines):
        right.new_line()


def _row(left: Column, right: Column, line: int, half: int, on: Screen) -> str:
    painted = [
        "".join(on.paint(style, text) for style, text in _joined(column.lines[line]))
        for column in (left, right)
    ]
    padding = " " * (half - left.width(line))
    return f"{painted[0]}{padding} {on.paint(FAINT, '|')} {painted[1]}".rstrip()


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbours of one style as one piece, so that a line is not full of codes."""
    style, texts = PLAIN, [""]
    for next_style, text in pieces:
        if next_style != style:
            yield style, "".join(texts)
            style, texts = next_style, []
        texts.append(text)
    yield style, "".join(texts)
