"""Reading whole files, unit by unit, in every format, and what happens to lines that are no documents."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tokedit.corpus import BadLine, Document, InputFile, WorkUnit, plan_units, read_unit
from megatron_tokedit.errors import DataFormatError

TEXTS = ["plain", "", "caf\u00e9 \U0001f600", " spaces ", "two\nlines\r\n", "nul\0 \u2028 sep", "x" * 5000]


def zstd_frames(data: bytes) -> bytes:
    """Three frames, the middle one without a content size, as streaming writers make them."""
    third = len(data) // 3
    streaming = zstandard.ZstdCompressor().compressobj()
    middle = streaming.compress(data[third : 2 * third]) + streaming.flush()
    whole = zstandard.ZstdCompressor().compress
    return whole(data[:third]) + middle + whole(data[2 * third :])


def gzip_members(data: bytes) -> bytes:
    return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip_members, ".zst": zstd_frames}


def json_lines(texts: list, key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def read_all(
    path: Path, keys: tuple[str, ...] = ("text",), **sizes: int
) -> tuple[list[Document], list[BadLine]]:
    """Read every unit after a trip of the plan through JSON, checking that the plan counted right."""
    files, units = plan_units([str(path)], **sizes)
    assert [InputFile.from_json(json.loads(json.dumps(f.to_json()))) for f in files] == files
    bad: list[BadLine] = []
    documents: list[Document] = []
    next_document = 0
    for number, unit in enumerate(units):
        unit = WorkUnit.from_json(json.loads(json.dumps(unit.to_json())))
        assert (unit.unit_id, unit.first_document) == (number, next_document)
        found = list(read_unit(unit, keys, on_bad=bad.append))
        documents += found
        next_document += unit.num_documents
    assert next_document == files[0].num_documents == len(documents) + len(bad)
    return documents, bad


def texts_of(documents: list[Document], key: str = "text") -> list[str]:
    assert all(len(document.fields[key]) == 1 for document in documents)
    return [document.fields[key][0] for document in documents]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("sizes", [{"unit_documents": 1}, {"unit_documents": 3}, {"unit_bytes": 40}, {}])
def test_json_lines(tmp_path: Path, suffix: str, sizes: dict[str, int]) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](json_lines(TEXTS)))
    documents, bad = read_all(path, **sizes)
    assert texts_of(documents) == TEXTS
    assert [document.line for document in documents] == list(range(1, len(TEXTS) + 1))
    assert [document.num_bytes for document in documents] == [len(text.encode()) for text in TEXTS]
    assert not bad


@pytest.mark.parametrize("suffix", COMPRESS)
def test_units_in_any_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](json_lines(TEXTS)))
    _, units = plan_units([str(path)], unit_documents=2)
    for order in ([0, 2, 3], [3, 1], [1, 1, 0]):
        for index in order:
            found = texts_of(list(read_unit(units[index], ["text"], on_bad=pytest.fail)))
            assert found == TEXTS[2 * index : 2 * index + 2]


def test_reading_may_stop_half_way(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(TEXTS)))
    _, units = plan_units([str(path)])
    assert next(read_unit(units[0], ["text"], on_bad=pytest.fail)).fields == {"text": [TEXTS[0]]}
    assert texts_of(list(read_unit(units[0], ["text"], on_bad=pytest.fail))) == TEXTS


def test_units_of_several_files_are_numbered_through(tmp_path: Path) -> None:
    paths = []
    for name in "ab":
        paths.append(str(tmp_path / f"{name}.jsonl"))
        Path(paths[-1]).write_bytes(json_lines(TEXTS[:3]))
    _, units = plan_units(paths, unit_documents=2)
    assert [(u.unit_id, u.first_document, u.num_documents) for u in units] == [
        (0, 0, 2),
        (1, 2, 2),
        (2, 4, 2),
    ]


def test_blank_lines_bom_windows_ends_and_missing_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \r\n{"text": "two\\r\\n"}\r\n\n{"text": "three"}'
    )
    for sizes in ({"unit_documents": 1}, {"unit_documents": 2}, {}):
        documents, bad = read_all(path, **sizes)
        assert texts_of(documents) == ["one", "two\r\n", "three"]
        assert [document.line for document in documents] == [1, 4, 6]
        assert not bad
    files, _ = plan_units([str(path)])
    assert files[0].num_blank == 3


def test_a_list_is_one_document_of_several_sequences(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json_lines([["a", "", "b"], [], "c"]))
    documents, _ = read_all(path)
    assert [document.fields["text"] for document in documents] == [["a", "", "b"], [], ["c"]]


def test_several_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_text('{"q": "ask", "a": ["x", "y"], "n": NaN}\n')
    documents, _ = read_all(path, keys=("a", "q"))
    assert documents[0].fields == {"a": ["x", "y"], "q": ["ask"]}
    assert documents[0].num_bytes == 5


BAD_LINES = [
    (b'{"text": "broken', "not valid JSON at column 10: Unterminated string"),
    (b'{"text": "x"} {"text": "y"}', "not valid JSON at column 15: Extra data"),
    (b'{"text": "\xff\xfe"}', "invalid UTF-8: byte 11 of the record is 0xff"),
    (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    (b'{"content": "x", "id": 3}', "key 'text' is missing; keys of this line: 'content', 'id'"),
    (b"{}", "key 'text' is missing; keys of this line: none"),
    (b'{"text": 3}', "'text' must be a string or a list of strings, got a number"),
    (b'{"text": null}', "got null"),
    (b'{"text": true}', "got true or false"),
    (b'{"text": {"a": 1}}', "got an object"),
    (b'{"text": ["a", 1]}', r"'text'\[1\] must be a string, got a number"),
    (b'["text"]', "a JSON object is expected, got a list"),
    (b'"text"', "a JSON object is expected, got a string"),
    (b"[" * 100000, "nested too deeply|not valid JSON"),
    ("text".encode("utf-16"), "invalid UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_reported_with_its_place(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    documents, bad = read_all(path, unit_documents=1)
    assert texts_of(documents) == ["one", "two"]
    assert [(found.path, found.line) for found in bad] == [(str(path), 3)]
    assert bad[0].reason == str(bad[0]).removeprefix(f"{path}:3: ")
    assert re.search(reason, bad[0].reason), bad[0].reason


def test_the_callback_may_stop_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1}\n{"text": "two"}\n')
    _, units = plan_units([str(path)])

    def stop(bad: BadLine) -> None:
        raise DataFormatError(str(bad))

    with pytest.raises(DataFormatError, match=r"a\.jsonl:1: 'text' must be"):
        list(read_unit(units[0], ["text"], on_bad=stop))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("sizes", [{"unit_documents": 1}, {"unit_bytes": 10}, {}])
def test_text_cut_at_separators(tmp_path: Path, suffix: str, sizes: dict[str, int]) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(
        COMPRESS[suffix](
            b"\xef\xbb\xbfone\nmore\n<|endoftext|>\n<|endoftext|>\r\ntwo\r\n\r\nlines\r\n"
            b"<|endoftext|>\n  \n<|endoftext|>glued<|endoftext|>\n\n three < |endoftext|> \n\n"
        )
    )
    documents, _ = read_all(path, keys=("body",), **sizes)
    expected = ["one\nmore", "two\n\nlines", "glued", "\n three < |endoftext|> \n"]
    assert texts_of(documents, "body") == expected
    assert [document.line for document in documents] == [1, 2, 3, 4]
    files, _ = plan_units([str(path)])
    assert (files[0].format, files[0].num_blank) == ("text_separated", 2)


def test_text_without_separators_is_one_document_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b" a line \r\n\nanother\n")
    documents, _ = read_all(path)
    assert texts_of(documents) == [" a line ", "another"]
    assert [document.line for document in documents] == [1, 3]
    assert plan_units([str(path)])[0][0].format == "text_lines"
    assert "every line is taken as a document" in caplog.text


def test_text_has_one_field(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\n")
    _, units = plan_units([str(path)])
    with pytest.raises(DataFormatError, match="a text file has one field, but keys a, b are asked for"):
        list(read_unit(units[0], ["a", "b"], on_bad=pytest.fail))


def test_invalid_utf8_in_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nbad \xe9\n")
    documents, bad = read_all(path)
    assert texts_of(documents) == ["good"]
    assert str(bad[0]) == f"{path}:2: invalid UTF-8: byte 5 of the record is 0xe9"


def write_parquet(path: Path, **columns: pyarrow.Array) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)


@pytest.mark.parametrize("sizes", [{"unit_documents": 1}, {"unit_documents": 4}, {"unit_bytes": 50}, {}])
def test_parquet(tmp_path: Path, sizes: dict[str, int]) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, text=pyarrow.array(TEXTS), id=pyarrow.array(range(len(TEXTS))))
    documents, bad = read_all(path, **sizes)
    assert texts_of(documents) == TEXTS
    assert [document.line for document in documents] == list(range(1, len(TEXTS) + 1))
    assert not bad


def test_parquet_lists_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    lists = pyarrow.array([["a", "b"], None, [], ["c", None]], pyarrow.large_list(pyarrow.large_string()))
    write_parquet(path, text=lists)
    documents, bad = read_all(path, unit_documents=3)
    assert [document.fields["text"] for document in documents] == [["a", "b"], []]
    assert [found.line for found in bad] == [2, 4]
    assert bad[0].reason == "'text' must be a string or a list of strings, got null"


def test_parquet_strings_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    offsets = pyarrow.py_buffer(np.array([0, 3, 5, 6], np.int32).tobytes())
    strings = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"one\xe9 2")]
    )
    write_parquet(path, text=strings)
    documents, bad = read_all(path)
    assert texts_of(documents) == ["one", "2"]
    assert [str(found) for found in bad] == [f"{path}:2: invalid UTF-8: byte 1 is 0xe9"]


def test_flipped_bytes_of_a_parquet_file_never_end_in_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, text=pyarrow.array(TEXTS[:4]))
    good = path.read_bytes()
    for position in range(0, len(good), 3):
        flipped = bytearray(good)
        flipped[position] ^= 0xFF
        path.write_bytes(flipped)
        with suppress(DataFormatError):
            read_all(path)


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, text=pyarrow.array([1, 2]), body=pyarrow.array(["a", "b"]))
    _, units = plan_units([str(path)])
    with pytest.raises(DataFormatError, match="has no column 'content'; its columns are text, body"):
        list(read_unit(units[0], ["content"], on_bad=pytest.fail))
    with pytest.raises(
        DataFormatError, match="column 'text' must hold strings or lists of strings, it holds int64"
    ):
        list(read_unit(units[0], ["text"], on_bad=pytest.fail))


def damaged(tmp_path: Path) -> list[tuple[str, bytes]]:
    good = json_lines([f"{hashlib.sha256(bytes([i])).hexdigest()}" for i in range(200)])
    parquet = tmp_path / "good.parquet"
    write_parquet(parquet, text=pyarrow.array(TEXTS))
    compressed = zstandard.ZstdCompressor().compress(good)
    return [
        ("truncated.jsonl.gz", gzip.compress(good)[:-20]),
        ("flipped.jsonl.gz", gzip.compress(good)[:100] + b"\x00\xff\x00\xff" + gzip.compress(good)[104:]),
        ("plain.jsonl.gz", good),
        ("truncated.jsonl.zst", compressed[: len(compressed) // 2]),
        ("second_frame_truncated.jsonl.zst", compressed + compressed[:20]),
        ("plain.jsonl.zst", good),
        ("plain.parquet", good),
        ("truncated.parquet", parquet.read_bytes()[:-30]),
        ("empty.jsonl", b""),
        ("blank.txt", b"\n \n\n"),
        ("separators.txt", b"<|endoftext|>\n<|endoftext|>\n"),
        ("empty.jsonl.gz", gzip.compress(b"")),
        ("no_bytes.jsonl.zst", b""),
        ("no_bytes.parquet", b""),
        ("array.json", b'[{"text": "a"},\n{"text": "b"}]\n'),
    ]


def test_damaged_and_empty_files_are_named(tmp_path: Path) -> None:
    for name, data in damaged(tmp_path):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DataFormatError, match=name.replace(".", r"\.")) as error:
            plan_units([str(path)])
        assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"gone\.jsonl: cannot be read: No such file"):
        plan_units([str(tmp_path / "gone.jsonl")])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_changed_since_the_plan_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](json_lines(TEXTS)))
    _, units = plan_units([str(path)], unit_documents=4)
    path.write_bytes(COMPRESS[suffix](json_lines(TEXTS[:2])))
    with pytest.raises(DataFormatError, match=r"changed since it was planned|ends at byte"):
        list(read_unit(units[1], ["text"], on_bad=pytest.fail))


def test_hash_and_size_are_those_of_the_file(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.jsonl{suffix}"
        data = compress(json_lines(TEXTS))
        path.write_bytes(data)
        files, _ = plan_units([str(path)])
        assert (files[0].num_bytes, files[0].sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_unit_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="not both"):
        plan_units([], unit_documents=1, unit_bytes=1)
    with pytest.raises(ValueError, match="positive"):
        plan_units([], unit_bytes=0)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(text, min_size=1, max_size=12),
    suffix=st.sampled_from(list(COMPRESS)),
    unit=st.sampled_from(["unit_documents", "unit_bytes"]),
    size=st.integers(1, 100),
)
def test_any_texts_survive_any_unit_size(
    tmp_path: Path, texts: list[str], suffix: str, unit: str, size: int
) -> None:
    path = tmp_path / f"h.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](json_lines(texts)))
    documents, bad = read_all(path, **{unit: size})
    assert texts_of(documents) == texts
    assert not bad


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.sampled_from(["<|endoftext|>", "\n", "a", "<|end", " b "]), min_size=1, max_size=30),
    size=st.integers(1, 40),
)
def test_cutting_text_does_not_depend_on_the_unit_size(tmp_path: Path, pieces: list[str], size: int) -> None:
    path = tmp_path / "h.txt"
    path.write_bytes(b"<|endoftext|>\nfirst<|endoftext|>" + "".join(pieces).encode())
    whole = texts_of(read_all(path)[0])
    assert texts_of(read_all(path, unit_bytes=size)[0]) == whole
    assert all("<|endoftext|>" not in text for text in whole)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(min_size=1, max_size=200),
    name=st.sampled_from(["f.jsonl", "f.txt", "f.jsonl.gz", "f.txt.zst"]),
)
def test_no_bytes_can_break_the_reader(tmp_path: Path, data: bytes, name: str) -> None:
    """Any file is read, or refused by DataFormatError; every record is a document or a bad line."""
    path = tmp_path / name
    path.write_bytes(data)
    with suppress(DataFormatError):
        read_all(path, unit_documents=2)
