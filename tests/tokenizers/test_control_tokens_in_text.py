"""Text that spells control tokens: which it can spell, and that splitting keeps it ordinary text."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tokedit.errors import TokenizerError
from megatron_tokedit.tokenizers import Tokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SPELLABLE = {
    "gpt2": {"<|endoftext|>", "<|im_start|>", "<|im_end|>"},
    "llama3": {"<|endoftext|>", "<|im_start|>", "<|im_end|>"},
    "qwen": {"<|endoftext|>", "<|im_start|>", "<|im_end|>"},
    "byte_fallback": {"<unk>", "<s>", "</s>"},
    "unigram": {"</s>"},
    "sp_bpe": {"<sep>", "<|im_start|>", "\u2581quick"},
    "sp_unigram": {"<sep>", "<|im_start|>", "\u2581quick"},
}
PLAIN = [
    "",
    " ",
    "a",
    "The fox, doesn't it?  In 1987\n\n\tx",
    "caf\u00e9 \u4f60\u597d \U0001f600",
    "< sep> <|im|>",
]


def names(tokenizer: Tokenizer, ids: frozenset[int]) -> set[str]:
    return {tokenizer.decode([*tokenizer.prefix_ids, i, *tokenizer.suffix_ids]) for i in ids}


def spelling_texts(token: str) -> list[str]:
    return [
        token,
        f"x{token}y",
        f" {token} ",
        f"{token}{token}",
        f"a\n{token}\n{token[:-1]}",
        f"{token[:-1]}{token}",
    ]


@pytest.mark.parametrize("name", SPELLABLE)
def test_what_text_can_spell_is_known(families: dict[str, tuple[str, str]], name: str) -> None:
    tokenizer = load_tokenizer(*families[name])
    expected = {token.replace("\u2581", "" if token[0] == "\u2581" else " ") for token in SPELLABLE[name]}
    assert {token.strip() for token in names(tokenizer, tokenizer.spellable_ids)} == expected
    assert tokenizer.spellable_ids <= tokenizer.special_ids
    for token in SPELLABLE[name]:
        ids = set(tokenizer.encode("x" + token.replace("\u2581", " ")))
        assert ids & tokenizer.spellable_ids


@pytest.mark.parametrize("name", [name for name in SPELLABLE if name != "unigram"])
def test_split_text_is_ordinary_text(families: dict[str, tuple[str, str]], name: str) -> None:
    whole = load_tokenizer(*families[name])
    split = load_tokenizer(*families[name], split_special_tokens=True)
    assert split.spellable_ids == frozenset()
    template = [*split.prefix_ids, *split.suffix_ids]
    for token in sorted(SPELLABLE[name]):
        for text in spelling_texts(token.replace("\u2581", " ")):
            ids = split.encode(text)
            assert ids == split.encode_batch([text])[0].tolist()
            assert sum(i in whole.spellable_ids for i in ids) == len(template)
            if name != "sp_unigram":  # it has no bytes to fall back on
                assert split.decode(ids) == text
    assert [split.encode(text) for text in PLAIN] == [whole.encode(text) for text in PLAIN]
    assert split.fingerprint == whole.fingerprint
    assert (split.special_ids, split.vocab_size) == (whole.special_ids, whole.vocab_size)


def test_split_documents_with_control_ids_still_decode(families: dict[str, tuple[str, str]]) -> None:
    for name in ("gpt2", "qwen", "byte_fallback", "sp_bpe"):
        split = load_tokenizer(*families[name], split_special_tokens=True)
        whole = load_tokenizer(*families[name])
        ids = [*split.encode("the fox"), split.eod]
        assert split.decode(ids) == whole.decode(ids) != "the fox"


def test_white_space_pieces_are_no_control_tokens(families: dict[str, tuple[str, str]]) -> None:
    for split in (False, True):
        tokenizer = load_tokenizer(*families["sp_bpe"], split_special_tokens=split)
        ids = tokenizer.encode("a  b")
        assert set(ids) & tokenizer.special_ids
        assert not set(ids) & tokenizer.spellable_ids


def test_unknown_characters_spell_nothing(families: dict[str, tuple[str, str]]) -> None:
    for name in ("unigram", "word_piece"):
        tokenizer = load_tokenizer(*families[name])
        ids = set(tokenizer.encode("a \U00012000 b"))
        assert ids & tokenizer.special_ids
        assert not ids & tokenizer.spellable_ids


def test_a_vocabulary_that_cannot_split_is_refused(families: dict[str, tuple[str, str]]) -> None:
    with pytest.raises(
        TokenizerError, match=r"text that spells </s> becomes that token even where it is to be"
    ):
        load_tokenizer(*families["unigram"], split_special_tokens=True)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared is not beside this checkout")
@pytest.mark.parametrize("model", ["tokenizers/gpt2", "tokenizers/gpt-neox", "priors/stories260K"])
def test_real_tokenizers_split(model: str) -> None:
    whole = load_tokenizer("HuggingFaceTokenizer", str(SHARED / model))
    split = load_tokenizer("HuggingFaceTokenizer", str(SHARED / model), split_special_tokens=True)
    assert whole.eod in whole.spellable_ids
    for token in sorted(names(whole, whole.spellable_ids)):
        for text in spelling_texts(token):
            ids = split.encode(text)[len(split.prefix_ids) :]
            assert not set(ids) & whole.spellable_ids
            assert split.decode(split.encode(text)) == text
    corpus = (SHARED / "corpora" / "literary" / "tinyshakespeare.txt").read_text()[:20_000]
    assert split.encode(corpus) == whole.encode(corpus)
    assert split.fingerprint == whole.fingerprint
