"""The nouns of reading: a document, a line that is none, an input file, a work unit.

Invariant: all are frozen; ``InputFile`` and ``WorkUnit`` survive JSON unchanged, so a plan can be stored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self


class _JsonRecord:
    """``to_json`` and ``from_json`` for flat dataclasses of strings and integers."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`."""
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Document:
    """One document of the corpus.

    Attributes:
        path: the input file.
        line: where it stands in the file, for messages: 1-based line (JSON lines, text lines), row (parquet)
            or ordinal (text cut at ``<|endoftext|>``).
        fields: JSON key -> its sequences. A plain string is a list of one; a list of strings is one document
            of several sequences, as in Megatron-LM.
        num_bytes: UTF-8 bytes of all fields.
    """

    path: str
    line: int
    fields: dict[str, list[str]]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line, row or text that could not be read as a document, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class InputFile(_JsonRecord):
    """What a scan found in one input file.

    Attributes:
        path: as given.
        format: ``jsonl``, ``text_lines`` (every line is a document), ``text_separated`` (cut at
            ``<|endoftext|>``) or ``parquet``.
        compression: ``none``, ``gzip`` or ``zstd``.
        num_bytes: size on disk.
        sha256: hex digest of the file as it is on disk.
        num_documents: documents, lines that will turn out to be bad included.
        num_blank: blank lines (or empty texts between separators); they are no documents and are skipped.
    """

    path: str
    format: str
    compression: str
    num_bytes: int
    sha256: str
    num_documents: int
    num_blank: int


@dataclass(frozen=True)
class WorkUnit(_JsonRecord):
    """A run of documents of one input file, the unit of work and of restart.

    Attributes:
        unit_id: 0-based over all inputs.
        path: the input file.
        format: as in :class:`InputFile`.
        compression: as in :class:`InputFile`.
        start: first byte of the (decompressed) file, or first row of a parquet file.
        stop: one past the last.
        first_line: the :attr:`Document.line` that ``start`` is.
        first_document: 0-based ordinal over all inputs of the unit's first document.
        num_documents: documents in the unit, bad lines included, blank lines not.
        num_bytes: size of the unit's text, approximate for parquet; for balancing and progress.
    """

    unit_id: int
    path: str
    format: str
    compression: str
    start: int
    stop: int
    first_line: int
    first_document: int
    num_documents: int
    num_bytes: int
