"""Planning: one scan of every input file finds its documents, its hash and where work units begin and end.

Invariant: every document of a file is in exactly one unit, in order, and the units depend only on its
contents and on the unit size. Memory: about 0.5 KB a file and 0.3 KB a unit, whatever their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tokedit.corpus.document import InputFile, WorkUnit
from megatron_tokedit.corpus.inputs import classify
from megatron_tokedit.corpus.scan import scan_lines, scan_texts
from megatron_tokedit.corpus.streams import (
    CHUNK_BYTES,
    HashingFile,
    contains_separator,
    decompressed,
    reading,
)
from megatron_tokedit.corpus.units import UnitBuilder
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.log import get_logger

DEFAULT_UNIT_BYTES = 8 << 20
_SHORT_LINE_BYTES = 80
_MAX_FILES_NAMED = 8

logger = get_logger(__name__)


def plan_units(
    paths: Sequence[str], *, unit_documents: int | None = None, unit_bytes: int | None = None
) -> tuple[list[InputFile], list[WorkUnit]]:
    """Scan the input files and cut them into work units. Files smaller than a unit share one.

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
    builder = UnitBuilder(unit_documents, unit_bytes)
    buffer = bytearray(CHUNK_BYTES)
    for path in paths:
        kind, compression = classify(path)
        if kind == "parquet":
            from megatron_tokedit.corpus.parquet import scan_parquet  # pyarrow only where it is needed

            file = scan_parquet(path, builder)
        else:
            file = _scan_records(path, kind, compression, builder, buffer)
        if file.num_documents == 0:
            raise DataFormatError(
                f"{path}: holds no document ({file.num_bytes} bytes, {file.num_blank} blank lines)"
            )
        files.append(file)
    _say_text_rules(files)
    return files, builder.finish()


def _scan_records(
    path: str, kind: str, compression: str, builder: UnitBuilder, buffer: bytearray
) -> InputFile:
    """Scan JSON lines or text."""
    separated = kind == "text" and contains_separator(path, compression)
    format_ = kind if kind == "jsonl" else "text_separated" if separated else "text_lines"
    builder.begin_file(path, format_, compression)
    num_records = 0
    with reading(path):
        hashing = HashingFile(path)
        with decompressed(hashing, compression) as stream:
            chunks = (
                scan_texts(stream) if separated else scan_lines(path, stream, buffer, json=kind == "jsonl")
            )
            for sizes_N, documents_N in chunks:
                builder.add(sizes_N, documents_N)
                num_records += len(sizes_N)
            num_bytes, sha256 = hashing.num_bytes, hashing.sha256
    builder.end_file()
    num_documents = builder.file_documents
    return InputFile(
        path, format_, compression, num_bytes, sha256, num_documents, num_records - num_documents
    )


def _say_text_rules(files: Sequence[InputFile]) -> None:
    """Log what was taken for a document in text files; for many files in one line."""
    for format_, rule in (("text_separated", "cut at <|endoftext|>"), ("text_lines", "one a line")):
        texts = [file for file in files if file.format == format_]
        for file in texts[:_MAX_FILES_NAMED]:
            logger.info("%s: %d documents, %s", file.path, file.num_documents, rule)
        if more := texts[_MAX_FILES_NAMED:]:
            documents = sum(file.num_documents for file in more)
            logger.info("%d more text files: %d documents, %s", len(more), documents, rule)
    short = [file for file in files if _has_short_lines(file)]
    for file in short[:1]:
        logger.warning(
            "%s%s: every line is taken as a document, and a line has %d bytes on average; if the lines are "
            "not documents, put <|endoftext|> between the documents",
            file.path,
            f" and {len(short) - 1} more files" if len(short) > 1 else "",
            sum(file.num_bytes for file in short) // sum(file.num_documents for file in short),
        )


def _has_short_lines(file: InputFile) -> bool:
    """Whether the lines of a text file are so short that they hardly are documents."""
    return (
        file.format == "text_lines"
        and file.compression == "none"
        and file.num_bytes < _SHORT_LINE_BYTES * file.num_documents
    )
