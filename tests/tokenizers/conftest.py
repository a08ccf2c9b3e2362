"""Tokenizers of the usual families, small, built by the libraries themselves."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? In 1987 it did; 3.14159 + 2 = 5.14159.",
    "def f(x):\n    return x ** 2\n\n\nclass A:\n\tpass\r\n" * 3,
    "na\u00efve caf\u00e9 r\u00e9sum\u00e9 \u00fcber stra\u00dfe \u2014 \u201cquoted\u201d \u2019s \u2026",
    "\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439 \u043c\u0438\u0440",
    "\u0645\u0631\u062d\u0628\u0627",
    "\u4f60\u597d\u4e16\u754c \u4f60\u4eec\u597d \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
    "\U0001f600\U0001f601 \U0001f468\u200d\U0001f469 \U0001f600",
] * 4


def _byte_level(folder: Path, kind: str) -> None:
    tokenizer = RustTokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = LLAMA3 if kind == "llama3" else LLAMA3.replace("{1,3}", "")
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[] if kind == "qwen" else SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "qwen":  # its control tokens stand beyond the vocabulary, ordinary added tokens beyond them
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
        tokenizer.add_tokens(["<tool_call>", "   "])
    if kind == "llama3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
        )
    _save(tokenizer, folder, "<|endoftext|>")


def _byte_fallback(folder: Path) -> None:
    tokenizer = RustTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<unk>", "<s>", "</s>", *fallback],
        limit_alphabet=70,
        show_progress=False,
    )
    tokenizer.train_from_iterator([part for line in CORPUS for part in line.split()], trainer)
    definition = json.loads(tokenizer.to_str())  # the bytes are pieces of the vocabulary, not added tokens
    definition["added_tokens"] = definition["added_tokens"][:3]
    tokenizer = RustTokenizer.from_str(json.dumps(definition))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    _save(tokenizer, folder, "</s>")


def _unigram(folder: Path) -> None:
    tokenizer = RustTokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581")
    tokenizer.decoder = decoders.Metaspace("\u2581")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    _save(tokenizer, folder, "</s>")


def _word_piece(folder: Path) -> None:
    tokenizer = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[SEP]"], limit_alphabet=40, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    _save(tokenizer, folder, "[SEP]")


def _save(tokenizer: RustTokenizer, folder: Path, eos: str) -> None:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _pieces(file: Path, model_type: str) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type=model_type,
        vocab_size=390 if model_type == "bpe" else 200,
        hard_vocab_limit=False,
        byte_fallback=model_type == "bpe",
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<sep>", "<|im_start|>", "\u2581\u2581", "\u2581quick"],
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Family -> tokenizer type and path."""
    root = tmp_path_factory.mktemp("families")
    for kind in ("gpt2", "llama3", "qwen"):
        _byte_level(root / kind, kind)
    _byte_fallback(root / "byte_fallback")
    _unigram(root / "unigram")
    _word_piece(root / "word_piece")
    _pieces(root / "sp_bpe", "bpe")
    _pieces(root / "sp_unigram", "unigram")
    hugging_face = ("gpt2", "llama3", "qwen", "byte_fallback", "unigram", "word_piece")
    return {name: ("HuggingFaceTokenizer", str(root / name)) for name in hugging_face} | {
        name: ("SentencePieceTokenizer", str(root / name)) for name in ("sp_bpe", "sp_unigram")
    }
