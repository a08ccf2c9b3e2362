"""Cutting the documents of a file into work units while it is scanned.

Invariant: every document is in exactly one unit, in order, and a unit never spans two files.
"""

from __future__ import annotations

from megatron_tokedit.corpus.document import WorkUnit


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
