"""Reading the documents of one work unit.

Invariant: a unit gives exactly the documents that the plan counted, each either as a :class:`Document` or as
a :class:`BadLine`, in file order; a file that changed since the plan was made is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_tokedit.corpus.document import BadLine, Document, WorkUnit
from megatron_tokedit.corpus.records import (
    BadRecord,
    is_blank,
    num_utf8_bytes,
    parse_json_record,
    parse_parquet_row,
    parse_text_record,
    strip_byte_order_mark,
)
from megatron_tokedit.corpus.streams import iter_records, open_at, park, reading
from megatron_tokedit.errors import DataFormatError


def read_unit(
    unit: WorkUnit, keys: Sequence[str], *, on_bad: Callable[[BadLine], None]
) -> Iterator[Document]:
    """Yield the documents of a unit, in file order.

    Args:
        unit: from :func:`megatron_tokedit.corpus.plan_units`.
        keys: wanted JSON keys or parquet columns; a text file has one field, which takes the only key's name.
        on_bad: called for every line, row or text that is no document; it may raise to stop.

    Raises:
        DataFormatError: the file is unreadable, damaged or changed since it was planned, a parquet column is
            missing, or several keys are asked of a text file.
    """
    if unit.format.startswith("text") and len(keys) != 1:
        raise DataFormatError(
            f"{unit.path}: a text file has one field, but keys {', '.join(keys)} are asked for"
        )
    if unit.format == "parquet":
        from megatron_tokedit.corpus.parquet import iter_rows  # pyarrow only where it is needed

        records: Iterator[tuple[int, Any]] = iter_rows(unit, keys)
    else:
        records = _iter_unit_records(unit)
    num_seen = 0
    for line, record in records:
        num_seen += 1
        try:
            fields = _parse(unit.format, record, keys)
            document = Document(unit.path, line, fields, num_utf8_bytes(fields))
        except BadRecord as error:
            on_bad(BadLine(unit.path, line, str(error)))
        else:
            yield document
    if num_seen != unit.num_documents:
        raise DataFormatError(
            f"{unit.path}: changed since it was planned: work unit {unit.unit_id} has {num_seen} documents, "
            f"planned were {unit.num_documents}; start again"
        )


def _parse(format_: str, record: Any, keys: Sequence[str]) -> dict[str, list[str]]:
    if format_ == "jsonl":
        return parse_json_record(record, keys)
    if format_ == "parquet":
        return parse_parquet_row(record, keys)
    return parse_text_record(record, keys[0], separated=format_ == "text_separated")


def _iter_unit_records(unit: WorkUnit) -> Iterator[tuple[int, bytes]]:
    """Yield the line number and bytes of every record that is not blank."""
    separated = unit.format == "text_separated"
    line, first_of_file = unit.first_line, unit.start == 0
    with reading(unit.path):
        stream = open_at(unit.path, unit.compression, unit.start)
        try:
            for record in iter_records(stream, separated, unit.stop - unit.start):
                body = strip_byte_order_mark(record) if first_of_file else record
                first_of_file = False
                blank = is_blank(body, separated)
                if not blank:
                    yield line, body
                line += 0 if blank and separated else 1
        except BaseException:  # an error, or a reader that stopped half-way
            stream.close()
            raise
        park(unit.path, unit.compression, unit.stop, stream)
