"""Bytes of ids that are parts of characters: put together, they are what decoding gives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_tokedit.tokenizers import Tokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
FAMILIES = ["gpt2", "llama3", "qwen", "byte_fallback", "unigram", "word_piece", "sp_bpe", "sp_unigram"]
REAL = [
    ("HuggingFaceTokenizer", "tokenizers/gpt2", 344),
    ("HuggingFaceTokenizer", "tokenizers/gpt-neox", 484),
    ("HuggingFaceTokenizer", "priors/stories260K", 128),
    ("SentencePieceTokenizer", "priors/stories260K", 128),
    ("SentencePieceTokenizer", "tokenizers/mistral-v1", 128),
    ("SentencePieceTokenizer", "tokenizers/tinystories-4096", 128),
]
TEXT = (
    "caf\u00e9 \u4f60\u597d \u0417\u0434\u0440\u0430 \u0645\u0631\u062d \U0001f600\U0001f9d1 \u2014 "
    "\u201cx\u201d \u07c0\u0915\u094d \U00012000 \u00bd\u212b a"
)


def check(tokenizer: Tokenizer, rounds: int) -> None:
    """Random rows of ids: their bytes are valid UTF-8 exactly where decoding loses nothing; then equal."""
    first, end = len(tokenizer.prefix_ids), -len(tokenizer.suffix_ids) or None
    lead = tokenizer.encode("a")[:end]
    incomplete = tokenizer.incomplete_utf8
    assert not set(incomplete) & tokenizer.special_ids

    def after_lead(ids: list[int]) -> str:
        text = tokenizer.decode([*lead, *ids, *tokenizer.suffix_ids])
        assert text[0] == "a"
        return text[1:]

    def bytes_of(id_: int) -> bytes:
        return incomplete[id_] if id_ in incomplete else after_lead([id_]).encode()

    generator = random.Random(5)
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    seen = {"valid": 0, "invalid": 0}
    for _ in range(rounds):
        ids = tokenizer.encode("x" + "".join(generator.choices(TEXT, k=6)))[first:end]
        pools = [ids, sorted(incomplete) or ids, ordinary]
        for _ in range(generator.randrange(3)):
            ids[generator.randrange(len(ids))] = generator.choice(generator.choice(pools))
        ids = [i for i in ids if i not in tokenizer.special_ids]
        together = b"".join(map(bytes_of, ids))
        try:
            expected = together.decode()
        except UnicodeDecodeError:
            seen["invalid"] += 1
            assert "\ufffd" in after_lead(ids)
        else:
            seen["valid"] += 1
            assert after_lead(ids) == expected
    assert seen["valid"] > rounds // 10
    assert seen["invalid"] > rounds // 20 or not incomplete


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_put_together_are_what_decoding_gives(families: dict[str, tuple[str, str]], name: str) -> None:
    tokenizer = load_tokenizer(*families[name])
    check(tokenizer, 2000)
    assert bool(tokenizer.incomplete_utf8) == (name not in ("unigram", "word_piece", "sp_unigram"))


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "byte_fallback", "sp_bpe"])
def test_all_other_ids_are_whole(families: dict[str, tuple[str, str]], name: str) -> None:
    tokenizer = load_tokenizer(*families[name])
    for id_ in range(tokenizer.vocab_size):
        broken = "\ufffd" in tokenizer.decode([id_])
        assert broken == (id_ in tokenizer.incomplete_utf8), id_


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared is not beside this checkout")
@pytest.mark.parametrize(("kind", "model", "number"), REAL)
def test_real_tokenizers(kind: str, model: str, number: int) -> None:
    tokenizer = load_tokenizer(kind, str(SHARED / model))
    assert len(tokenizer.incomplete_utf8) == number
    check(tokenizer, 2000)
