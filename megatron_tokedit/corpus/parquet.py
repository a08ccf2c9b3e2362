"""Parquet files: rows as documents, read in batches of the wanted columns only.

Invariant: memory depends on the size of a row group's pages, not on the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_tokedit.corpus.document import InputFile, UnitPart
from megatron_tokedit.corpus.streams import CHUNK_BYTES, HashingFile, reading
from megatron_tokedit.corpus.units import UnitBuilder
from megatron_tokedit.errors import DataFormatError

_BATCH_ROWS = 512
_TEXT_SCALARS = (pyarrow.StringScalar, pyarrow.LargeStringScalar)
_DAMAGE = (pyarrow.ArrowException, OSError, ValueError)  # what pyarrow raises on damaged files


def scan_parquet(path: str, builder: UnitBuilder) -> InputFile:
    """Hash a parquet file and cut its rows into units; the column contents are not read.

    Raises:
        DataFormatError: not a parquet file, or a damaged one.
    """
    with reading(path):
        hashing = HashingFile(path)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while hashing.readinto(buffer):
            pass
        hashing.close()
    with _open(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        num_rows, text_bytes = file.metadata.num_rows, sum(group.total_byte_size for group in groups)
    if num_rows != sum(group.num_rows for group in groups):
        raise DataFormatError(f"{path}: is damaged: its row groups do not add up to its {num_rows} rows")
    builder.begin_file(path, "parquet", "none")
    builder.add_rows(num_rows, max(1, text_bytes // max(1, num_rows)))
    builder.end_file()
    return InputFile(path, "parquet", "none", hashing.num_bytes, hashing.sha256, num_rows, 0)


def iter_rows(part: UnitPart, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the 1-based row number and the wanted columns' scalars, for every row of the part.

    Raises:
        DataFormatError: a column is missing or holds neither strings nor lists of strings, or the file is
            damaged.
    """
    with _open(part.path) as file:
        _check_columns(part.path, file.schema_arrow, keys)
        yield from _iter_columns(file, part, keys)


def iter_conversation_rows(part: UnitPart, keys: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """As :func:`iter_rows`, of columns of any type, and of those of ``keys`` that are there.

    Raises:
        DataFormatError: none of the columns is there, or the file is damaged.
    """
    with _open(part.path) as file:
        names = file.schema_arrow.names
        found = [name for name in names if name in keys]
        if not found:
            raise DataFormatError(
                f"{part.path}: no column holds a conversation; its columns are {', '.join(names)}; name "
                "them, for example --sft-keys prompt=COLUMN response=COLUMN"
            )
        yield from _iter_columns(file, part, found)


def _iter_columns(
    file: pyarrow.parquet.ParquetFile, part: UnitPart, keys: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a part of an open file."""
    groups, row = _row_groups(file.metadata, part.start, part.stop)
    batches = file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(keys), use_threads=False)
    for batch in _damage_reported(part.path, batches):
        skip = max(0, part.start - row)
        wanted = batch.slice(skip, max(0, part.stop - row - skip))
        first = row + skip + 1
        row += batch.num_rows
        columns = {key: wanted.column(key) for key in keys}
        for index in range(wanted.num_rows):
            yield first + index, {key: column[index] for key, column in columns.items()}


def num_row_bytes(row: dict[str, Any]) -> int:
    """Count the bytes of a row's strings, valid UTF-8 or not."""
    return sum(map(_num_bytes, row.values()))


def _num_bytes(value: Any) -> int:
    """Bytes of the strings of a pyarrow scalar: a string, or what strings are nested in."""
    if not value.is_valid:
        return 0
    if isinstance(value, pyarrow.DictionaryScalar):
        return _num_bytes(value.value)
    if isinstance(value, pyarrow.ListScalar):
        return sum(map(_num_bytes, value.values))
    if isinstance(value, pyarrow.StructScalar):
        return sum(map(_num_bytes, value.values()))
    return int(value.as_buffer().size) if isinstance(value, _TEXT_SCALARS) else 0


def _open(path: str) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path)
    except _DAMAGE as error:
        raise DataFormatError(f"{path}: is not a readable parquet file: {error}") from error


def _damage_reported(path: str, batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except _DAMAGE as error:
        raise DataFormatError(f"{path}: is damaged: {error}") from error


def _row_groups(metadata: Any, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold rows ``[start, stop)``, and the first row of the first of them."""
    groups: list[int] = []
    first_row = row = 0
    for index in range(metadata.num_row_groups):
        next_row = row + metadata.row_group(index).num_rows
        if row < stop and next_row > start:
            first_row = first_row if groups else row
            groups.append(index)
        row = next_row
    return groups, first_row


def _check_columns(path: str, schema: pyarrow.Schema, keys: Sequence[str]) -> None:
    for key in keys:
        if key not in schema.names:
            raise DataFormatError(f"{path}: has no column {key!r}; its columns are {', '.join(schema.names)}")
        kind, types = schema.field(key).type, pyarrow.types
        wraps = types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind)
        item = kind.value_type if wraps else kind
        if not (types.is_string(item) or types.is_large_string(item)):
            raise DataFormatError(
                f"{path}: column {key!r} must hold strings or lists of strings, it holds {kind}"
            )
