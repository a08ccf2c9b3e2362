"""Text that is shown while it is written: never half a character, and together exactly the decoded text."""

from __future__ import annotations

import numpy as np
import pytest
from generation_cases import TOKENIZERS
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.generation.text import TextStream, certain_length, first_stop, token_texts
from megatron_tokedit.tokenizers import load_tokenizer

LOADED = {name: load_tokenizer(*spec) for name, spec in TOKENIZERS.items()}
TEXTS = [
    "The river rises in the hills.",
    " a space in front,  two  inside ",
    "def f(x):\n\treturn x ** 2\r\n",
    "caf\u00e9 na\u00efve \u4f60\u597d\u4e16\u754c \U0001f600\U0001f468\u200d\U0001f469 \u0417\u0434\u0440",
    "\u4f60\u597d",
    "",
]


def streamed(tokenizer, context, ids) -> list[str]:
    stream = TextStream(tokenizer, context)
    return [*(stream.push(id_) for id_ in ids), stream.flush()]


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("text", TEXTS)
def test_parts_are_whole_characters_and_add_up(name, text):
    tokenizer = LOADED[name]
    ids = tokenizer.encode(text)
    for context in ([], [tokenizer.eod]):
        parts = streamed(tokenizer, context, ids)
        assert "".join(parts) == text
        assert not any("\ufffd" in part for part in parts)
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        if "\ufffd" not in before:
            assert before + "".join(streamed(tokenizer, ids[:cut], ids[cut:])) == text


@settings(deadline=None)
@pytest.mark.parametrize("name", LOADED)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\x00"), max_size=30))
def test_any_text_comes_back(name, text):
    tokenizer = LOADED[name]
    ids = tokenizer.encode("a" + text)
    assert "".join(streamed(tokenizer, [], ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", LOADED)
def test_broken_bytes_become_replacement_characters(name):
    tokenizer = LOADED[name]
    lead = next(i for i, b in tokenizer.incomplete_utf8.items() if b == b"\xe4")
    letter = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([lead, i]).endswith("\ufffda"))
    assert streamed(tokenizer, [tokenizer.eod], [lead, letter]) == ["", "\ufffda", ""]
    assert streamed(tokenizer, [tokenizer.eod], [lead, lead, letter]) == ["", "\ufffd", "\ufffda", ""]
    assert streamed(tokenizer, [], [lead]) == ["", "\ufffd"]


@pytest.mark.parametrize("name", LOADED)
def test_random_ids_hold_back_unfinished_characters_only(name):
    tokenizer = LOADED[name]
    random = np.random.default_rng(0)
    usable = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    for _ in range(200):
        ids = random.choice(usable, 12).tolist()
        stream = TextStream(tokenizer, [tokenizer.eod])
        shown = "".join(stream.push(id_) for id_ in ids)
        rest = stream.flush()
        assert rest in ("", "\ufffd")
        if name == "byte level":  # one decoder of bytes; others replace whole runs of them
            assert shown + rest == tokenizer.decode([tokenizer.eod, *ids]).removeprefix(
                tokenizer.decode([tokenizer.eod])
            )


def test_texts_of_single_tokens():
    tokenizer = LOADED["sentencepiece"]
    ids = tokenizer.encode("the river")
    assert "".join(token_texts(tokenizer, [tokenizer.eod], ids)) == "the river"
    assert token_texts(tokenizer, ids, tokenizer.encode("rises"))[0].startswith(" ")


def test_stop_texts():
    assert first_stop("one two", 0, ["two", "ne"]) == 1
    assert first_stop("aXb", 2, ["X"]) is None  # it was not there before, so it is not looked for again
    assert first_stop("a\n\nb", 2, ["\n\n"]) == 1
    assert certain_length("abc\n", ["\n\n"]) == 3
    assert certain_length("abcab", ["abd", "bc"]) == 3
    assert certain_length("abc", []) == 3
