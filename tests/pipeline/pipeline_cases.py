"""What the tests of the pipeline and of its command share: a corpus, a tokenizer, a small prior."""

from __future__ import annotations

import random
from pathlib import Path

import orjson

DATA = Path(__file__).resolve().parents[1] / "data"
TOKENIZER = str(DATA / "tiny_sentencepiece.model")
VOCAB_SIZE = 340
TEXT = "the river rises in hills and falls into sea ; nobody counts its stones . Caf\u00e9 \U0001f600 def add"
WORDS = TEXT.split()


def write_corpus(path: Path, num_documents: int = 40, seed: int = 0) -> Path:
    """JSON lines with fields ``text`` and ``title``; some documents are empty, short or lists."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        for index in range(num_documents):
            text: str | list[str] = " ".join(rng.choices(WORDS, k=rng.choice((0, 1, 5, 20, 60))))
            if index % 7 == 3:
                text = [text, "", text[::-1]]
            file.write(orjson.dumps({"text": text, "title": f"document {index}"}) + b"\n")
    return path


def settings(tmp_path: Path, name: str, **changes: object) -> dict[str, object]:
    """Settings of a job over ``tmp_path/corpus.jsonl`` that writes ``tmp_path/NAME_text_document``."""
    return {
        "input": [str(tmp_path / "corpus.jsonl")],
        "output_prefix": str(tmp_path / name),
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": TOKENIZER,
        "append_eod": True,
        "edit_strategy": "none",
        "unit_documents": 3,
        "workers": 1,
    } | changes


def editing(prior: Path, **changes: object) -> dict[str, object]:
    """Settings that make a random prior edit much."""
    return {
        "edit_strategy": "up_revise",
        "edit_threshold": 0.003,
        "prior": str(prior),
        "prior_device": "cpu",
        "prior_context": 24,
        "prior_overlap": 8,
        "prior_batch_tokens": 200,
    } | changes


def output_bytes(
    tmp_path: Path, name: str, key: str = "text", suffixes: tuple[str, ...] = (".bin", ".idx")
) -> list[bytes]:
    """The bytes of a job's outputs."""
    return [(tmp_path / f"{name}_{key}_document{suffix}").read_bytes() for suffix in suffixes]
