"""Cutting the documents of the input files into work units while they are scanned.

Invariant: every document is in exactly one unit, in order, and the units depend only on the documents' sizes
and the unit size. A unit is full with the document that reaches the unit size; until then it goes on with the
next file, so that small files share a unit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_tokedit.corpus.document import UnitPart, WorkUnit


class UnitBuilder:
    """Collects the documents of all files into units.

    For each file: :meth:`begin_file`, then :meth:`add` or :meth:`add_rows`, then :meth:`end_file`; at the end
    :meth:`finish`. One of the two unit sizes is given.
    """

    def __init__(self, unit_documents: int | None, unit_bytes: int | None) -> None:
        self._unit_documents, self._unit_bytes = unit_documents, unit_bytes
        self._units: list[WorkUnit] = []
        self._first_document = 0
        # The unit that is being filled: its closed parts, and the documents and bytes in them.
        self._parts: list[UnitPart] = []
        self._closed_documents = self._closed_bytes = 0
        self.begin_file("", "", "none")

    def begin_file(self, path: str, format_: str, compression: str) -> None:
        """Start at the beginning of a file, see :class:`UnitPart`."""
        self._path, self._format, self._compression = path, format_, compression
        self._start = self._stop = 0
        self._first_line = self._next_line = 1
        self._part_documents = 0
        self.file_documents = 0

    def add(self, sizes_N: npt.NDArray[np.int64], documents_N: npt.NDArray[np.bool_]) -> None:
        """Add records of a file of lines or texts.

        Args:
            sizes_N: bytes of each record, terminators included.
            documents_N: whether each is a document; a blank one waits for the next document.
        """
        ends_N = np.cumsum(sizes_N) + self._stop
        counts_N = np.cumsum(documents_N, dtype=np.int64)
        lines_N = counts_N if self._format == "text_separated" else np.arange(1, len(sizes_N) + 1)
        first_line, counted, index = self._next_line, 0, 0
        while index < len(sizes_N):
            last = min(self._last_of_unit(ends_N, counts_N, index, counted), len(sizes_N) - 1)
            self._stop = int(ends_N[last])
            self._next_line = first_line + int(lines_N[last])
            self._part_documents += int(counts_N[last]) - counted
            counted, index = int(counts_N[last]), last + 1
            self._end_unit_if_full(self._stop - self._start)
        self.file_documents += counted

    def add_rows(self, num_rows: int, row_bytes: int) -> None:
        """Add the rows of a parquet file, all taken to be of the same size (at least 1 byte)."""
        self.file_documents = num_rows
        while self._stop < num_rows:
            if self._unit_documents is not None:
                wanted = self._unit_documents - self._closed_documents
            else:
                assert self._unit_bytes is not None
                wanted = -(-(self._unit_bytes - self._closed_bytes) // row_bytes)
            rows = min(max(1, wanted), num_rows - self._stop)
            self._stop += rows
            self._next_line += rows
            self._part_documents = rows
            self._end_unit_if_full(rows * row_bytes)
        self._end_part(self._part_documents * row_bytes)

    def end_file(self) -> None:
        """Close the part; the unit goes on with the next file."""
        self._end_part(self._stop - self._start)

    def finish(self) -> list[WorkUnit]:
        """Close the last unit and return all of them."""
        self._end_unit()
        return self._units

    def _last_of_unit(
        self, ends_N: npt.NDArray[np.int64], counts_N: npt.NDArray[np.int64], index: int, counted: int
    ) -> int:
        """The record from ``index`` on with which the unit is full; N if none of these is it."""
        documents = self._part_documents - counted  # with record j the part has this + counts_N[j]
        if self._unit_documents is not None:
            return int(np.searchsorted(counts_N, self._unit_documents - self._closed_documents - documents))
        assert self._unit_bytes is not None
        full = int(np.searchsorted(ends_N, self._unit_bytes - self._closed_bytes + self._start))
        return max(full, int(np.searchsorted(counts_N, 1 - documents)), index)

    def _end_unit_if_full(self, part_bytes: int) -> None:
        """Close the part and the unit if the part's last document has filled the unit."""
        if self._unit_documents is not None:
            full = self._closed_documents + self._part_documents >= self._unit_documents
        else:
            assert self._unit_bytes is not None
            full = self._part_documents > 0 and self._closed_bytes + part_bytes >= self._unit_bytes
        if full:
            self._end_part(part_bytes)
            self._end_unit()

    def _end_part(self, num_bytes: int) -> None:
        """Close the part, if it holds a document; blank lines without one wait for the next document."""
        if self._part_documents == 0:
            return
        part = UnitPart(
            path=self._path,
            format=self._format,
            compression=self._compression,
            start=self._start,
            stop=self._stop,
            first_line=self._first_line,
            num_documents=self._part_documents,
            num_bytes=num_bytes,
        )
        self._parts.append(part)
        self._closed_documents += part.num_documents
        self._closed_bytes += part.num_bytes
        self._start, self._first_line, self._part_documents = self._stop, self._next_line, 0

    def _end_unit(self) -> None:
        if not self._parts:
            return
        self._units.append(
            WorkUnit(
                unit_id=len(self._units),
                parts=tuple(self._parts),
                first_document=self._first_document,
                num_documents=self._closed_documents,
                num_bytes=self._closed_bytes,
            )
        )
        self._first_document += self._closed_documents
        self._parts = []
        self._closed_documents = self._closed_bytes = 0
