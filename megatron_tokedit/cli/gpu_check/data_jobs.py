"""Real text that every Python installation has, a tokenizer trained on it, and the dataset made of it.

Invariant: the same Python version gives the same text, and what is held out is not trained on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_tokedit.cli.gpu_check.sizes import Scale

TOKENIZER = "tokenizer.model"
TRAIN_TEXT, HELD_OUT_TEXT = "train.jsonl", "held_out.jsonl"
DATASET = "train_text_document"
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_LEAST_CHARACTERS, _MOST_CHARACTERS = 200, 10_000
_HELD_OUT_SHARE = 0.125


def prepare_data(folder: Path, scale: Scale) -> dict[str, Any]:
    """Collect the text, train the tokenizer, write the dataset.

    Returns:
        Documents, characters and tokens.
    """
    from megatron_tokedit.config.preprocess import preprocess_config
    from megatron_tokedit.pipeline import run
    from megatron_tokedit.testing.models import train_sentencepiece

    train, held_out = split_text(scale)
    for name, texts in ((TRAIN_TEXT, train), (HELD_OUT_TEXT, held_out)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / name).write_text(lines, encoding="utf-8")
    train_sentencepiece(folder / TOKENIZER, train, vocab_size=scale.vocab_size)
    settings = {
        "input": [str(folder / TRAIN_TEXT)],
        "output_prefix": str(folder / "train"),
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(folder / TOKENIZER),
        "append_eod": True,
        "edit_strategy": "none",
        "workers": 1,
    }
    result = run(preprocess_config(settings, origin="gpu_check"))
    assert result.totals is not None
    counts = result.totals.keys["text"]
    return {
        "documents": counts.documents,
        "held_out_documents": len(held_out),
        "characters": sum(map(len, train)),
        "tokens": counts.tokens,
    }


def split_text(scale: Scale) -> tuple[list[str], list[str]]:
    """Texts to train on, and others."""
    train: list[str] = []
    held_out: list[str] = []
    missing = {"train": scale.corpus_characters, "held_out": scale.held_out_characters}
    for text in _texts():
        digest = hashlib.blake2b(text.encode(), digest_size=2).digest()
        is_held_out = int.from_bytes(digest, "big") < _HELD_OUT_SHARE * 2**16
        name, part = ("held_out", held_out) if is_held_out else ("train", train)
        if missing[name] > 0:
            part.append(text)
            missing[name] -= len(text)
        if max(missing.values()) <= 0:
            break
    return train, held_out


def _texts() -> Iterator[str]:
    """The Python reference and the docstrings of the standard library, each once."""
    seen = set()
    for text in _candidates():
        key = hashlib.blake2b(text.encode("utf-8", errors="replace")).digest()
        if _LEAST_CHARACTERS <= len(text) <= _MOST_CHARACTERS and key not in seen:
            seen.add(key)
            yield text.encode("utf-8", errors="replace").decode("utf-8")


def _candidates() -> Iterator[str]:
    with suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(root).parts[:-1]):
            yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
