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
from megatron_tokedit.corpus.units import UnitBuilder
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
