"""Spans, colours and lines of the inspection commands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.cli.inspect_compare import Counts, compare_tokens, compare_words
from megatron_tokedit.cli.inspect_text import (
    ADDED,
    PLAIN,
    REMOVED,
    Screen,
    num_cells,
    printable,
    side_by_side,
    span_texts,
    visible_change,
    words,
    wrapped,
)
from megatron_tokedit.tokenizers import load_tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
TOKENIZERS = [
    load_tokenizer("SentencePieceTokenizer", str(DATA / "tiny_sentencepiece.model")),
    load_tokenizer("HuggingFaceTokenizer", str(DATA / "tiny_byte_level_bpe")),
]
TEXT = "the river rises in the hills ; nobody counts its stones def add"
characters = st.text(st.sampled_from("ab \n\u4e2d\u0301e"), max_size=80)
pieces = st.lists(st.tuples(st.sampled_from([PLAIN, REMOVED, ADDED]), characters), max_size=6)


def unpainted(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["sentencepiece", "byte_level_bpe"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_spans_make_up_the_text(tokenizer, data) -> None:
    text = " ".join(data.draw(st.lists(st.sampled_from(TEXT.split()), max_size=20)))
    ids = np.array(tokenizer.encode(text), np.int32)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    assert "".join(span_texts(tokenizer, ids, [0, *sorted(cuts), len(ids)])) == text


def test_a_character_cut_in_two_is_whole_again_in_the_end() -> None:
    tokenizer = TOKENIZERS[1]
    ids = np.array(tokenizer.encode("x \U0001f600 y"), np.int32)
    texts = span_texts(tokenizer, ids, range(len(ids) + 1))
    assert [text for text in texts if "\U0001f600" in text] != []
    assert texts[0] == "x"
    assert texts[-1].endswith("y")


@settings(max_examples=200, deadline=None)
@given(old=st.lists(st.integers(0, 30), max_size=30), new=st.lists(st.integers(0, 30), max_size=30))
def test_segments_make_up_both_documents(old: list[int], new: list[int]) -> None:
    comparison = compare_tokens(None, np.array(old, np.int32), np.array(new, np.int32))
    segments = list(comparison.segments())
    before = "".join(segment.old for segment in segments).replace("\u00b7", " ")
    after = "".join(segment.new for segment in segments).replace("\u00b7", " ")
    assert (before.split(), after.split()) == (list(map(str, old)), list(map(str, new)))
    assert any(segment.changed for segment in segments) == (old != new)
    counts = Counts()
    counts.add(comparison)
    changed, dropped, inserted = (int(number) for number in counts.by_kind[1:])
    assert len(old) - dropped + inserted == len(new)
    assert bool(changed + dropped + inserted) == counts.different == (old != new)


@settings(max_examples=200, deadline=None)
@given(old=characters, new=characters)
def test_words_make_up_both_texts(old: str, new: str) -> None:
    assert "".join(words(old)) == old
    comparison = compare_words(old, new)
    assert comparison.differs == (old != new)
    unchanged = [segment for segment in comparison.segments() if not segment.changed]
    assert all(segment.old == segment.new for segment in unchanged)


@settings(max_examples=200, deadline=None)
@given(text=pieces, num_columns=st.integers(2, 30), colour=st.booleans())
def test_lines_fit_and_lose_nothing_but_space(text, num_columns: int, colour: bool) -> None:
    lines = [unpainted(line) for line in wrapped(text, Screen(colour, num_columns))]
    assert all(num_cells(line) <= num_columns for line in lines)
    expected = "".join(part for _, part in Screen(colour, None).marked(text))
    assert "".join(lines).replace(" ", "") == expected.replace(" ", "").replace("\n", "")
    whole = [unpainted(line) for line in wrapped(text, Screen(colour, None))]
    assert "\n".join(whole) == expected


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        characters.map(lambda text: ([(PLAIN, text)],) * 2)
        | st.tuples(characters, characters).map(lambda texts: ([(REMOVED, texts[0])], [(ADDED, texts[1])])),
        max_size=5,
    ),
    colour=st.booleans(),
)
def test_two_columns_fit_and_lose_nothing_but_space(rows, colour: bool) -> None:
    on = Screen(colour, 33)
    lines = [unpainted(line) for line in side_by_side(rows, on)]
    for side in (0, 1):
        shown = "".join(part for row in rows for _, part in on.marked(row[side]))
        expected = re.sub(r"\s", "", shown)
        columns = [(line + " ").split(" | ", 1)[side] if " | " in line + " " else line for line in lines]
        assert re.sub(r"\s|\|$", "", "".join(columns)) == expected
    assert all(num_cells(line) <= 33 for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("a", "b", ("a", "b")),
        (" a", " b", (" a", " b")),
        ("a", " a", ("a", "\u00b7a")),
        (" ", "", ("\u00b7", "")),
        ("\n", " ", ("\\n", "\u00b7")),
        ("a\tb", "a", ("a\\tb", "a")),
        ("same", "same", ("same<1 2>", "same<3>")),
        ("", "x", ("<1 2>", "x")),
        ("\x1b[2J", "x", ("\\x1b[2J", "x")),
    ],
)
def test_changes_are_visible(old: str, new: str, shown: tuple[str, str]) -> None:
    ids = (np.array([1, 2]) if old or new == "x" else np.array([]), np.array([3]) if new else np.array([]))
    assert visible_change(old, new, ids) == shown


def test_control_characters_cannot_steer_a_terminal() -> None:
    text = "".join(map(chr, [*range(32), *range(127, 160), 0x202E, 0x2066]))
    assert set(printable(text)) <= set("\n\t\\x0123456789abcdef")
