"""From the bytes of one record to the fields of a document, or to the reason why it is none.

Invariant: a record is judged by its own bytes and the wanted keys alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson

from megatron_tokedit.corpus.streams import BYTE_ORDER_MARK, SEPARATOR


class BadRecord(Exception):
    """A record that is no document; the message is the reason, for :class:`BadLine`."""


def strip_byte_order_mark(record: bytes) -> bytes:
    """Remove a UTF-8 byte order mark from the first record of a file."""
    return record.removeprefix(BYTE_ORDER_MARK)


def is_blank(record: bytes, separated: bool) -> bool:
    """Whether a record holds nothing but white space (and its terminator): no document, skipped."""
    return not (record.removesuffix(SEPARATOR) if separated else record).strip()


def parse_json_record(record: bytes, keys: Sequence[str]) -> dict[str, list[str]]:
    """Read one line of JSON.

    Raises:
        BadRecord: not UTF-8, not JSON, not an object, a key is missing, or a value is neither a string nor a
            list of strings.
    """
    values = parse_json_object(record)
    return {key: _sequences(values, key) for key in keys}


def parse_json_object(record: bytes) -> dict[str, Any]:
    """Read one line of JSON that is an object.

    Raises:
        BadRecord: not UTF-8, not JSON, or not an object.
    """
    values = _parse_json(record)
    if not isinstance(values, dict):
        raise BadRecord(f"a JSON object is expected, got {json_type(values)}")
    return values


def parse_text_record(record: bytes, key: str, separated: bool) -> dict[str, list[str]]:
    """Read one line, or one text between separators, as the only field of a document.

    Line ends directly beside a separator belong to the separator; Windows line ends become line feeds.

    Raises:
        BadRecord: not UTF-8.
    """
    text = decode_utf8(record).replace("\r\n", "\n")
    if separated:
        text = text.removesuffix(SEPARATOR.decode()).removeprefix("\n")
    return {key: [text.removesuffix("\n")]}


def parse_parquet_row(row: dict[str, Any], keys: Sequence[str]) -> dict[str, list[str]]:
    """Read one row of pyarrow scalars.

    Raises:
        BadRecord: a value is null or holds a null, or its bytes are not UTF-8 (which parquet does not check).
    """
    try:
        return {key: _as_sequences(row[key].as_py(), key) for key in keys}
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"invalid UTF-8: byte {error.start + 1} is 0x{error.object[error.start]:02x}"
        ) from error


def parquet_values(row: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a row of pyarrow scalars of any type.

    Raises:
        BadRecord: bytes that are not UTF-8.
    """
    try:
        return {key: scalar.as_py() for key, scalar in row.items()}
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"invalid UTF-8: byte {error.start + 1} is 0x{error.object[error.start]:02x}"
        ) from error


def num_utf8_bytes(fields: dict[str, list[str]]) -> int:
    """Count the UTF-8 bytes of all fields.

    Raises:
        BadRecord: a text holds half of a surrogate pair, which UTF-8 (and a tokenizer) cannot hold.
    """
    try:
        return sum(
            len(text) if text.isascii() else len(text.encode()) for texts in fields.values() for text in texts
        )
    except UnicodeEncodeError as error:
        raise BadRecord(f"the text holds half of a surrogate pair (character {error.start})") from error


def decode_utf8(record: bytes) -> str:
    """Decode, or raise :class:`BadRecord` with the place of the first wrong byte."""
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = record[error.start]
        raise BadRecord(f"invalid UTF-8: byte {error.start + 1} of the record is 0x{wrong:02x}") from error


def _parse_json(record: bytes) -> Any:
    try:
        return orjson.loads(record)
    except orjson.JSONDecodeError:
        pass  # stricter than the json module, which Megatron-LM uses: NaN, Infinity, half surrogates
    try:
        return json.loads(decode_utf8(record.rstrip(b"\r\n")))
    except json.JSONDecodeError as error:
        raise BadRecord(f"not valid JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise BadRecord("not usable JSON: nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise BadRecord(f"not usable JSON: {error}") from error


def _sequences(values: dict[str, Any], key: str) -> list[str]:
    if key not in values:
        present = ", ".join(repr(name) for name in list(values)[:8]) or "none"
        raise BadRecord(f"key {key!r} is missing; keys of this line: {present}")
    return _as_sequences(values[key], key)


def _as_sequences(value: Any, key: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        for index, item in enumerate(value):
            if not isinstance(item, str):
                raise BadRecord(f"{key!r}[{index}] must be a string, got {json_type(item)}")
        return value
    raise BadRecord(f"{key!r} must be a string or a list of strings, got {json_type(value)}")


def json_type(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
