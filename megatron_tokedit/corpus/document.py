"""The nouns of reading: a document, a line that is none, an input file, a work unit.

Invariant: all are frozen; ``InputFile`` and ``WorkUnit`` survive JSON unchanged, so a plan can be stored. A
plan holds one :class:`InputFile` and at least one :class:`UnitPart` for every file, so both are slim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from megatron_tokedit.corpus.conversations import Conversation


class _JsonRecord:
    """``to_json`` and ``from_json`` for flat dataclasses, with slots, of strings and integers."""

    __slots__: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
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
        num_bytes: UTF-8 bytes of all fields, or of the conversation's messages.
        conversation: where the input is read as conversations; ``fields`` is empty then.
    """

    path: str
    line: int
    fields: dict[str, list[str]]
    num_bytes: int
    conversation: Conversation | None = None


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line, row or text that could not be read as a document, and why.

    Attributes:
        path: the input file.
        line: as :attr:`Document.line`.
        reason: what is wrong with it.
        num_bytes: bytes of the record as it stands in the (decompressed) file, its line end or separator
            included, a byte order mark not; for parquet those of the wanted columns' strings.
    """

    path: str
    line: int
    reason: str
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class UnitPart(_JsonRecord):
    """A run of documents of one input file.

    Attributes:
        path: the input file.
        format: as in :class:`InputFile`.
        compression: as in :class:`InputFile`.
        start: first byte of the (decompressed) file, or first row of a parquet file.
        stop: one past the last.
        first_line: the :attr:`Document.line` that ``start`` is.
        num_documents: documents in the part, bad lines included, blank lines not.
        num_bytes: size of the part's text, approximate for parquet; for balancing and progress.
    """

    path: str
    format: str
    compression: str
    start: int
    stop: int
    first_line: int
    num_documents: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A run of documents over one or several input files, the unit of work and of restart.

    Attributes:
        unit_id: 0-based over all inputs.
        parts: at least one, in the order of the inputs; a small file is a part, a big one has many.
        first_document: 0-based ordinal over all inputs of the unit's first document.
        num_documents: documents of all parts.
        num_bytes: bytes of all parts.
    """

    unit_id: int
    parts: tuple[UnitPart, ...]
    first_document: int
    num_documents: int
    num_bytes: int

    @property
    def where(self) -> str:
        """The unit's place in the input, for messages."""
        first, last = self.parts[0], self.parts[-1]
        noun = {"parquet": "row", "text_separated": "document"}.get(first.format, "line")
        place = f"{first.path}, from {noun} {first.first_line}"
        return place if last.path == first.path else f"{place}, to {last.path}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return {
            "unit_id": self.unit_id,
            "first_document": self.first_document,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "parts": [part.to_json() for part in self.parts],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> WorkUnit:
        """Rebuild from :meth:`to_json`."""
        parts = tuple(UnitPart.from_json(part) for part in fields["parts"])
        return cls(**{**fields, "parts": parts})
