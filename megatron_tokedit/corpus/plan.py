"""Planning: one scan of every input file finds its documents, its hash and where work units begin and end.

Invariant: every document of a file is in exactly one unit, in order, and the units depend only on its
contents and on the unit size; memory depends on neither.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tokedit.corpus.document import InputFile, WorkUnit
from megatron_tokedit.corpus.inputs import classify
from megatron_tokedit.corpus.records import is_blank, strip_byte_order_mark
from megatron_tokedit.corpus.streams import (
    HashingFile,
    contains_separator,
    decompressed,
    iter_records,
    reading,
)
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.log import get_logger

DEFAULT_UNIT_BYTES = 8 << 20
_SHORT_LINE_BYTES = 80

logger = get_logger(__name__)


def plan_units(
    paths: Sequence[str], *, unit_documents: int | None = None, unit_bytes: int | None = None
) -> tuple[list[InputFile], list[WorkUnit]]:
    """Scan the input files and cut them into work units. A unit never spans two files.

    Args:
        paths: from :func:`megatron_tokedit.corpus.expand_inputs`.
        unit_documents: documents a unit.
        unit_bytes: a unit ends with the document that reaches this many bytes of (decompressed) input; for
            parquet the mean size of a row is used. Default, where neither is given: 8 MiB.

    Returns:
        The files, in the order of ``paths``, and the units, numbered over all files.

    Raises:
        DataFormatError: a file is empty, unreadable, damaged or not in the format of its suffix.
        ValueError: both sizes are given, or one is not positive.
    """
    if unit_documents is not None and unit_bytes is not None:
        raise ValueError("give unit_documents or unit_bytes, not both")
    if any(size is not None and size < 1 for size in (unit_documents, unit_bytes)):
        raise ValueError("the unit size must be positive")
    if unit_documents is None and unit_bytes is None:
        unit_bytes = DEFAULT_UNIT_BYTES
    files: list[InputFile] = []
    units: list[WorkUnit] = []
    for path in paths:
        builder = UnitBuilder(path, units, unit_documents, unit_bytes)
        kind, compression = classify(path)
        if kind == "parquet":
            from megatron_tokedit.corpus.parquet import scan_parquet  # pyarrow only where it is needed

            file = scan_parquet(path, builder)
        else:
            file = _scan_records(path, kind, compression, builder)
        if file.num_documents == 0:
            raise DataFormatError(
                f"{path}: holds no document ({file.num_bytes} bytes, {file.num_blank} blank lines)"
            )
        files.append(file)
    return files, units


class UnitBuilder:
    """Collects the documents of one file into units, appended to the list of all units."""

    def __init__(
        self, path: str, units: list[WorkUnit], unit_documents: int | None, unit_bytes: int | None
    ) -> None:
        """Start at the beginning of ``path``; ``units`` holds the units of the files before it."""
        self.path = path
        self.format = ""
        self.compression = "none"
        self.unit_documents = unit_documents
        self.unit_bytes = unit_bytes
        self.num_documents = 0
        self._units = units
        self._first_document = units[-1].first_document + units[-1].num_documents if units else 0
        self._start = self._stop = 0
        self._first_line = self._next_line = 1
        self._unit_documents_so_far = 0

    def add(self, size: int, *, lines: int, documents: int) -> None:
        """Add ``size`` bytes that hold ``documents`` (0 or 1) and advance the line count by ``lines``."""
        self._stop += size
        self._next_line += lines
        self.num_documents += documents
        self._unit_documents_so_far += documents
        full = self.unit_documents is not None and self._unit_documents_so_far >= self.unit_documents
        full = full or (self.unit_bytes is not None and self._stop - self._start >= self.unit_bytes)
        if full:
            self.end_unit()

    def add_rows(self, num_rows: int, num_bytes: int) -> None:
        """Cut the rows of a parquet file, of ``num_bytes`` in all, into units."""
        row_bytes = max(1, num_bytes // max(1, num_rows))
        rows_a_unit = self.unit_documents or max(1, (self.unit_bytes or 1) // row_bytes)
        self.num_documents = num_rows
        for start in range(0, num_rows, rows_a_unit):
            stop = min(start + rows_a_unit, num_rows)
            self._first_line = start + 1
            self._append(start, stop, stop - start, (stop - start) * row_bytes)

    def end_unit(self) -> None:
        """Close the unit, if it holds a document; blank lines without one wait for the next document."""
        if self._unit_documents_so_far:
            self._append(self._start, self._stop, self._unit_documents_so_far, self._stop - self._start)
            self._start, self._first_line, self._unit_documents_so_far = self._stop, self._next_line, 0

    def _append(self, start: int, stop: int, num_documents: int, num_bytes: int) -> None:
        self._units.append(
            WorkUnit(
                unit_id=len(self._units),
                path=self.path,
                format=self.format,
                compression=self.compression,
                start=start,
                stop=stop,
                first_line=self._first_line,
                first_document=self._first_document,
                num_documents=num_documents,
                num_bytes=num_bytes,
            )
        )
        self._first_document += num_documents


def _scan_records(path: str, kind: str, compression: str, builder: UnitBuilder) -> InputFile:
    """Scan JSON lines or text."""
    separated = kind == "text" and contains_separator(path, compression)
    builder.format = kind if kind == "jsonl" else "text_separated" if separated else "text_lines"
    builder.compression = compression
    num_blank = 0
    with reading(path):
        hashing = HashingFile(path)
        with decompressed(hashing, compression) as stream:
            for index, record in enumerate(iter_records(stream, separated)):
                body = strip_byte_order_mark(record) if index == 0 else record
                if kind == "jsonl" and index == 0:
                    _refuse_json_array(path, body)
                blank = is_blank(body, separated)
                num_blank += blank
                builder.add(len(record), lines=0 if blank and separated else 1, documents=0 if blank else 1)
            num_bytes, sha256 = hashing.num_bytes, hashing.sha256
    builder.end_unit()
    file = InputFile(path, builder.format, compression, num_bytes, sha256, builder.num_documents, num_blank)
    _say_text_rule(file)
    return file


def _refuse_json_array(path: str, first_line: bytes) -> None:
    if first_line.lstrip().startswith(b"["):
        raise DataFormatError(
            f"{path}:1: is a JSON array, but one JSON object a line is expected; "
            f"convert it, for example with: jq -c '.[]' {path} > NEW.jsonl"
        )


def _say_text_rule(file: InputFile) -> None:
    if file.format == "text_separated":
        logger.info("%s: %d documents, cut at <|endoftext|>", file.path, file.num_documents)
    elif file.format == "text_lines":
        logger.info("%s: %d documents, one a line", file.path, file.num_documents)
        if file.compression == "none" and file.num_bytes < _SHORT_LINE_BYTES * file.num_documents:
            logger.warning(
                "%s: every line is taken as a document, and a line has %d bytes on average; if the lines are "
                "not documents, put <|endoftext|> between the documents",
                file.path,
                file.num_bytes // max(1, file.num_documents),
            )
