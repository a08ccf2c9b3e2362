"""gigatoken in place of the tokenizers library: the same ids always, and not where it cannot."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.tokenizers import Tokenizer, fast_encoder, load_tokenizer
from megatron_tokedit.tokenizers.probes import outside, probe_texts, sure_characters

try:
    import gigatoken
except ImportError:
    gigatoken = None

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_gigatoken = pytest.mark.skipif(
    gigatoken is None, reason="gigatoken (the extra `fast`) is not installed"
)
FAST = ["gpt2", "llama3", "qwen", "byte_fallback"]
TEXTS = [
    "",
    "The fox doesn't.  In 1987\n\n\tx",
    "<|endoftext|>a <|im_start|> <tool_call>   b</s>",
    "\u0891\u0898\u089f newer marks, e\u0301",
    "\U00011eed\U0002420c unassigned",
    "caf\u00e9 \u4f60\u597d \U0001f600",
]


def refused(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "installed but not used" in record.message]


@pytest.fixture(scope="module")
def loaded(families: dict[str, tuple[str, str]]) -> dict[tuple[str, bool], Tokenizer]:
    return {
        (name, split): load_tokenizer(*families[name], split_special_tokens=split)
        for name in FAST
        for split in (False, True)
    }


def test_sure_characters_are_what_text_is_made_of() -> None:
    pattern = outside(sure_characters())
    assert not pattern.search(
        "caf\u00e9 \u201cx\u201d \u2014 \u4f60\ud55c\u0639\u0915\u094d\u09ce\u0d7a\u20b9 \U0001f600\ufe0f"
    )
    for text in ("\u0898", "\u1abf", "\U0001e030", "\U000323b0", "\u0378", "\U0010ffff"):
        assert pattern.search(f"some {text} text")
    assert len(set(sure_characters())) > 100_000


def test_probes_show_every_added_token_and_script() -> None:
    texts = "".join(probe_texts(["<|endoftext|>", "<x>"]))
    for shown in ("<|endoftext|>", "<x>", "\u0915", "\u0639", "\u4f60", "\uac00", "\U0001f600"):
        assert shown in texts


def test_without_gigatoken_the_library_encodes_and_nothing_is_said(
    families: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # what import finds where it is not installed
    tokenizer = load_tokenizer(*families["gpt2"])
    assert tokenizer.encoder.startswith("tokenizers ")
    assert not refused(caplog)


def test_a_damaged_gigatoken_is_said_once_and_not_used(
    families: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", ModuleType("gigatoken"))
    tokenizer = load_tokenizer(*families["gpt2"])
    with caplog.at_level(logging.WARNING):
        batches = [tokenizer.encode_batch(TEXTS) for _ in range(3)]
    assert len(refused(caplog)) == 1
    assert tokenizer.encoder.startswith("tokenizers ")
    assert [ids.tolist() for ids in batches[0]] == [tokenizer.encode(text) for text in TEXTS]


@needs_gigatoken
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", FAST)
def test_the_ids_are_the_library_s(loaded: dict[tuple[str, bool], Tokenizer], name: str, split: bool) -> None:
    tokenizer = loaded[name, split]
    assert tokenizer.encoder.startswith("gigatoken ")
    batch = tokenizer.encode_batch(TEXTS)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in TEXTS]
    assert {ids.dtype for ids in batch} == {np.dtype(np.int32)}


@needs_gigatoken
@pytest.mark.parametrize("name", FAST)
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_ids_are_the_library_s_for_any_text(
    loaded: dict[tuple[str, bool], Tokenizer], name: str, text: str
) -> None:
    tokenizer = loaded[name, False]
    assert tokenizer.encode_batch([text, text + "a"])[0].tolist() == tokenizer.encode(text)


@needs_gigatoken
@pytest.mark.parametrize("name", FAST)
def test_every_sure_character_gets_the_library_s_ids(
    loaded: dict[tuple[str, bool], Tokenizer], name: str
) -> None:
    tokenizer: Any = loaded[name, False]
    characters = "".join(map(chr, sure_characters()))
    texts = [characters[start : start + 50] for start in range(0, len(characters), 50)]
    fast, slow = tokenizer._fast.encode_batch(texts), tokenizer._encode_standard(texts)
    assert all(map(np.array_equal, fast, slow))


@needs_gigatoken
def test_starting_afresh_changes_no_ids(
    families: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_encoder, "_MAX_CHARACTERS", 100)
    tokenizer: Any = load_tokenizer(*families["llama3"])
    texts = [f"word{i} {'x' * i}" for i in range(150)]
    before = tokenizer._fast._encode_one
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(t) for t in texts]
    assert tokenizer._fast._encode_one is not before


@needs_gigatoken
def test_other_ids_are_noticed(
    families: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = (Path(families["qwen"][1]) / "tokenizer.json").read_text()
    from_json = gigatoken.Tokenizer.from_json
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda definition: from_json(other))
    tokenizer = load_tokenizer(*families["gpt2"])
    with caplog.at_level(logging.WARNING):
        assert tokenizer.encoder.startswith("tokenizers ")
    assert "it gives other ids for '" in refused(caplog)[0]


@needs_gigatoken
def test_a_kind_that_gigatoken_does_not_know_is_left_to_the_library(
    families: dict[str, tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(*families["word_piece"])
    with caplog.at_level(logging.WARNING):
        assert tokenizer.encoder.startswith("tokenizers ")
    assert len(refused(caplog)) == 1
    assert "it cannot represent this tokenizer (" in refused(caplog)[0]


@needs_gigatoken
@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared is not beside this checkout")
@pytest.mark.parametrize("model", ["tokenizers/gpt2", "tokenizers/gpt-neox", "priors/stories260K"])
def test_real_tokenizers(model: str) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(SHARED / model))
    assert tokenizer.encoder.startswith("gigatoken ")
    texts = (SHARED / "corpora" / "wikitext2" / "valid.txt").read_text()[:200_000].split("\n")
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [
        tokenizer.encode(text) for text in texts
    ]
