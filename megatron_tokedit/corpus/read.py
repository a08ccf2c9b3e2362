"""Reading the documents of one work unit.

Invariant: a unit gives exactly the documents that the plan counted, each either as a :class:`Document` or as
a :class:`BadLine`, in file order; a file that changed since the plan was made is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tokedit.corpus.conversations import num_utf8_bytes as num_conversation_bytes
from megatron_tokedit.corpus.conversations import parse_conversation, wanted_keys
from megatron_tokedit.corpus.document import BadLine, Document, UnitPart, WorkUnit
from megatron_tokedit.corpus.records import (
    BadRecord,
    is_blank,
    num_utf8_bytes,
    parquet_values,
    parse_json_object,
    parse_json_record,
    parse_parquet_row,
    parse_text_record,
    strip_byte_order_mark,
)
from megatron_tokedit.corpus.streams import iter_records, open_at, park, reading
from megatron_tokedit.errors import DataFormatError


@dataclass(frozen=True, slots=True)
class ConversationLayout:
    """How records hold conversations; see :func:`megatron_tokedit.corpus.conversations.parse_conversation`.

    Attributes:
        layout: name of the layout, or ``auto``.
        keys: part of a conversation -> key; None: the layout's.
    """

    layout: str = "auto"
    keys: Mapping[str, str] | None = None


def read_unit(
    unit: WorkUnit, keys: Sequence[str] | ConversationLayout, *, on_bad: Callable[[BadLine], None]
) -> Iterator[Document]:
    """Yield the documents of a unit, in the order of the input.

    Args:
        unit: from :func:`megatron_tokedit.corpus.plan_units`.
        keys: wanted JSON keys or parquet columns; a text file has one field, which takes the only key's name.
            A layout instead: every record is a conversation.
        on_bad: called for every line, row or text that is no document; it may raise to stop.

    Raises:
        DataFormatError: the file is unreadable, damaged or changed since it was planned, a parquet column is
            missing, or several keys, or conversations, are asked of a text file.
    """
    for part in unit.parts:
        if not part.format.startswith("text"):
            continue
        if isinstance(keys, ConversationLayout):
            raise DataFormatError(
                f"{part.path}: a text file holds no conversations; give JSON lines or parquet, or leave "
                "--format sft out"
            )
        if len(keys) != 1:
            raise DataFormatError(
                f"{part.path}: a text file has one field, but keys {', '.join(keys)} are asked for"
            )
    for part in unit.parts:
        yield from _read_part(unit.unit_id, part, keys, on_bad)


def _read_part(
    unit_id: int,
    part: UnitPart,
    keys: Sequence[str] | ConversationLayout,
    on_bad: Callable[[BadLine], None],
) -> Iterator[Document]:
    """The documents of one file's part of a unit."""
    num_bytes: Callable[[Any], int] = len
    if part.format == "parquet":
        # pyarrow only where needed
        from megatron_tokedit.corpus.parquet import iter_conversation_rows, iter_rows, num_row_bytes

        num_bytes = num_row_bytes
        records: Iterator[tuple[int, Any]] = (
            iter_conversation_rows(part, wanted_keys(keys.keys))
            if isinstance(keys, ConversationLayout)
            else iter_rows(part, keys)
        )
    else:
        records = _iter_part_records(part)
    num_seen = 0
    for line, record in records:
        num_seen += 1
        try:
            document = _parse(part, line, record, keys)
        except BadRecord as error:
            on_bad(BadLine(part.path, line, str(error), num_bytes(record)))
        else:
            yield document
    if num_seen != part.num_documents:
        raise DataFormatError(
            f"{part.path}: changed since it was planned: work unit {unit_id} has {num_seen} of its "
            f"documents, planned were {part.num_documents}; start again"
        )


def _parse(part: UnitPart, line: int, record: Any, keys: Sequence[str] | ConversationLayout) -> Document:
    """The document of a record."""
    if isinstance(keys, ConversationLayout):
        values = parse_json_object(record) if part.format == "jsonl" else parquet_values(record)
        conversation = parse_conversation(values, keys.layout, keys.keys)
        return Document(part.path, line, {}, num_conversation_bytes(conversation), conversation)
    if part.format == "parquet":
        fields = parse_parquet_row(record, keys)
    elif part.format == "jsonl":
        fields = parse_json_record(record, keys)
    else:
        fields = parse_text_record(record, keys[0], separated=part.format == "text_separated")
    return Document(part.path, line, fields, num_utf8_bytes(fields))


def _iter_part_records(part: UnitPart) -> Iterator[tuple[int, bytes]]:
    """Yield the line number and bytes of every record that is not blank."""
    separated = part.format == "text_separated"
    line, first_of_file = part.first_line, part.start == 0
    with reading(part.path):
        stream = open_at(part.path, part.compression, part.start)
        try:
            for record in iter_records(stream, separated, part.stop - part.start):
                body = strip_byte_order_mark(record) if first_of_file else record
                first_of_file = False
                blank = is_blank(body, separated)
                if not blank:
                    yield line, body
                line += 0 if blank and separated else 1
        except BaseException:  # an error, or a reader that stopped half-way
            stream.close()
            raise
        park(part.path, part.compression, part.stop, stream)
