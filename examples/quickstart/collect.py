"""Collect real human text that is on every machine: the Python reference and the docstrings of packages.

Nothing is imported and nothing is downloaded: packages are found on disk and their sources parsed. Documents
are de-duplicated, then dealt into three parts by a hash of their text, so that the same machine always gives
the same parts:

- ``prior``: the prior model is trained on these and never sees the others;
- ``train``: the corpus that is edited and trained on;
- ``heldout``: for evaluation, by domain.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import orjson

DOMAINS = {
    "reference": [],  # pydoc_data.topics: the Python language reference
    "stdlib": [],  # the standard library's docstrings
    "numpy": ["numpy"],
    "torch": ["torch"],
    "mathematics": ["sympy", "networkx"],
}
MIN_CHARACTERS = 300
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "__pycache__", "idlelib", "lib2to3"}
DOCSTRING_CALLS = {"add_docstr", "add_newdoc", "add_newdoc_for_scalar_type"}
PARTS = ("prior", "train", "heldout")


def docstrings_of(path: Path) -> Iterator[str]:
    """Docstrings of a source file, and the texts handed to numpy's and torch's ``add_docstr`` functions."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in DOCSTRING_CALLS:
                for argument in ast.walk(node):
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield inspect.cleandoc(argument.value)


def sources_below(folder: Path) -> Iterator[Path]:
    """Python files below a folder, in a fixed order, without tests."""
    for path in sorted(folder.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(folder).parts[:-1]):
            yield path


def texts_of_domain(domain: str) -> Iterator[str]:
    """All texts of a domain, before length filter and de-duplication."""
    if domain == "reference":
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    elif domain == "stdlib":
        for path in sources_below(Path(inspect.getfile(json)).parents[1]):
            yield from docstrings_of(path)
    else:
        for package in DOMAINS[domain]:
            spec = importlib.util.find_spec(package)
            if spec is not None and spec.submodule_search_locations:
                for path in sources_below(Path(next(iter(spec.submodule_search_locations)))):
                    yield from docstrings_of(path)


class Deduplicator:
    """Drops a text when nearly all of its long lines have been seen already: copies and near copies."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """True, and remembers the text's lines, unless 80% of its characters or more are old lines."""
        stripped = [line.strip() for line in text.splitlines()]
        lines = [line for line in stripped if len(line) >= 20] or stripped
        keys = [hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines]
        old = sum(len(line) for line, key in zip(lines, keys, strict=True) if key in self.seen)
        self.seen.update(keys)
        return old < max(1, 0.8 * sum(map(len, lines)))


def part_of(text: str) -> str:
    """45% of documents for the prior, 45% for training, 10% held out, by a hash of the text."""
    bucket = hashlib.blake2b(text.encode(), digest_size=8).digest()[0]
    return "prior" if bucket < 115 else "train" if bucket < 230 else "heldout"


def read_user_text(path: Path) -> Iterator[tuple[str, str]]:
    """(domain, text) of a user's jsonl (keys ``text`` and, if there, ``domain``) or plain text file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if path.suffix != ".jsonl":
                yield "input", line.decode("utf-8").rstrip("\r\n")
                continue
            try:
                record = orjson.loads(line)
                yield str(record.get("domain", "input")), record["text"]
            except (orjson.JSONDecodeError, KeyError, AttributeError) as error:
                raise SystemExit(
                    f"{path}:{number}: expected a JSON object with a 'text' key ({error!r})"
                ) from error


def all_documents(user_input: Path | None) -> Iterator[tuple[str, str]]:
    """(domain, text) of every kept document."""
    deduplicator = Deduplicator()
    if user_input is not None:
        candidates = read_user_text(user_input)
    else:
        candidates = ((d, t) for d in DOMAINS for t in texts_of_domain(d) if len(t) >= MIN_CHARACTERS)
    for domain, text in candidates:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a docstring may hold a lone surrogate on purpose
            continue
        if deduplicator.is_new(text):
            yield domain, text


def collect(output_dir: Path, user_input: Path | None, max_bytes: int) -> dict[str, dict]:
    """Write ``prior.jsonl``, ``train.jsonl`` and ``heldout-DOMAIN.jsonl``.

    Args:
        output_dir: made if it is not there.
        user_input: a file to read instead of this machine's documentation.
        max_bytes: keep at most so much text of a domain in ``prior`` and in ``train``, and a fifth of it in
            ``heldout``; 0 keeps all. What is left out is counted.

    Returns:
        ``{domain: {part: {"documents", "bytes", "left_out_documents"}}}``.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    documents = sorted((hashlib.blake2b(t.encode()).digest(), d, t) for d, t in all_documents(user_input))
    lines: dict[str, list[bytes]] = {}
    counts: dict[str, dict] = {}
    for _, domain, text in documents:
        part = part_of(text)
        zero = {"documents": 0, "bytes": 0, "left_out_documents": 0}
        count = counts.setdefault(domain, {p: dict(zero) for p in PARTS})[part]
        size = len(text.encode())
        limit = max_bytes // 5 if part == "heldout" else max_bytes
        if limit and count["bytes"] + size > limit and count["documents"]:
            count["left_out_documents"] += 1
            continue
        name = f"heldout-{domain}" if part == "heldout" else part
        lines.setdefault(name, []).append(orjson.dumps({"text": text, "domain": domain}) + b"\n")
        count["documents"] += 1
        count["bytes"] += size
    empty = [f"{d}/{p}" for d in counts for p in PARTS if not counts[d][p]["documents"]]
    if not counts or empty:
        raise SystemExit(
            f"too little text to split into {', '.join(PARTS)} ({', '.join(empty) or 'all of it'} is empty): "
            "give at least a hundred documents a domain"
        )
    for name, content in lines.items():
        (output_dir / f"{name}.jsonl").write_bytes(b"".join(content))
    return counts
