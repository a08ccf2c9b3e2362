"""Text and tokenizers for the benchmarks that begin with text; both are on every machine.

Invariant: no text occurs twice, so that no tokenizer's cache sees what it would not see in a corpus.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

DOCUMENT_CHARACTERS = 2000
VOCAB_SIZE = 32000


def documents_of(path: Path) -> Iterator[str]:
    """Documents of a file: each string of a JSON record, each source file, or lines put together."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    if path.suffix in (".jsonl", ".ndjson"):
        for line in text.splitlines():
            yield from (value for value in orjson.loads(line).values() if isinstance(value, str))
        return
    if path.suffix == ".py":
        yield text
        return
    lines, size = list[str](), 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def gather(files: Sequence[str] | None, megabytes: float) -> list[str]:
    """Up to so many megabytes of documents of which none occurs twice.

    Args:
        files: txt, jsonl or py; None: the sources of this Python and its packages.
        megabytes: of characters, in millions.
    """
    folders = sysconfig.get_paths()
    found = files or sorted(Path(folders["purelib"]).rglob("*.py")) + sorted(
        Path(folders["stdlib"]).glob("*.py")
    )
    seen, documents, size = set[bytes](), list[str](), 0
    for path in found:
        for document in documents_of(Path(path)):
            digest = hashlib.sha256(document.encode()).digest()
            if not document.strip() or digest in seen:
                continue
            seen.add(digest)
            documents.append(document)
            size += len(document)
            if size >= megabytes * 1e6:
                return documents
    return documents


def write_jsonl(documents: Sequence[str], path: Path) -> None:
    """The documents, a JSON record a line."""
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in documents))


def train_tokenizer(documents: Sequence[str], folder: Path, vocab_size: int = VOCAB_SIZE) -> str:
    """A byte-level BPE of GPT-2's kind, for a machine that has none at hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    return str(folder)
