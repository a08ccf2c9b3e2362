"""Work units over many files: what shares one, what it costs, and that its size changes no document."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tokedit.corpus import BadLine, WorkUnit, expand_inputs, plan_units, read_unit
from megatron_tokedit.corpus.records import is_blank
from megatron_tokedit.corpus.scan import scan_lines
from megatron_tokedit.corpus.streams import iter_records
from megatron_tokedit.errors import DataFormatError


def write_file(path: Path, texts: list[str]) -> None:
    """One document a text, in the format of the suffix; JSON lines begin with a blank line."""
    lines = "".join(["\n", *(json.dumps({"text": text}) + "\n" for text in texts)]).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{text}<|endoftext|>\n" for text in texts))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    else:
        path.write_bytes(lines)


def read_units(units: list[WorkUnit]) -> list[tuple[str, int, str]]:
    found = []
    for unit in units:
        unit = WorkUnit.from_json(json.loads(json.dumps(unit.to_json())))
        documents = list(read_unit(unit, ["text"], on_bad=pytest.fail))
        assert len(documents) == unit.num_documents == sum(part.num_documents for part in unit.parts)
        found += [(document.path, document.line, document.fields["text"][0]) for document in documents]
    return found


SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(
        st.tuples(st.sampled_from(SUFFIXES), st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6)),
        min_size=1,
        max_size=5,
    ),
    unit=st.sampled_from(["unit_documents", "unit_bytes"]),
    size=st.integers(1, 200),
)
def test_a_unit_over_several_files_has_the_documents_of_any_other_cut(
    tmp_path: Path, files: list[tuple[str, list[str]]], unit: str, size: int
) -> None:
    paths = []
    for number, (suffix, texts) in enumerate(files):
        paths.append(str(tmp_path / f"{number}{suffix}"))
        write_file(Path(paths[-1]), texts)
    inputs, units = plan_units(paths, **{unit: size})
    found = read_units(units)
    assert [text for _, _, text in found] == [text for _, texts in files for text in texts]
    assert found == read_units(plan_units(paths, unit_documents=1)[1])
    assert [unit.first_document for unit in units] == [
        sum(unit.num_documents for unit in units[:index]) for index in range(len(units))
    ]
    assert sum(file.num_documents for file in inputs) == len(found)
    if unit == "unit_documents":
        assert {unit.num_documents for unit in units[:-1]} <= {size}
    else:
        assert all(unit.num_bytes >= size for unit in units[:-1])


def test_small_files_share_a_unit_and_big_ones_are_cut(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number:03d}.jsonl") for number in range(100)]
    for path in paths:
        write_file(Path(path), ["a tiny document"])  # 29 bytes with the blank line
    paths.insert(50, str(tmp_path / "big.jsonl"))
    write_file(tmp_path / "big.jsonl", ["a long document " * 10] * 50)
    _, units = plan_units(paths, unit_bytes=1000)
    assert len(units) == 12
    assert all(1000 <= unit.num_bytes < 1180 for unit in units[:-1])
    assert len(units[0].parts) == 35
    assert sum(any(part.path.endswith("big.jsonl") for part in unit.parts) for unit in units) > 8
    assert units[0].where == f"{paths[0]}, from line 1, to {paths[34]}"
    (inside,) = units[6].parts
    assert units[6].where == f"{tmp_path}/big.jsonl, from line {inside.first_line}"


def test_units_depend_on_contents_not_on_names(tmp_path: Path) -> None:
    cuts = []
    for folder in ("one", "another"):
        (tmp_path / folder).mkdir()
        paths = [str(tmp_path / folder / f"{folder}{number}.jsonl") for number in range(5)]
        for path in paths:
            write_file(Path(path), ["some", "text"])
        units = plan_units(paths, unit_documents=3)[1]
        cuts.append([[(part.start, part.stop, part.first_line) for part in unit.parts] for unit in units])
    assert cuts[0] == cuts[1]


def test_blank_lines_at_the_seams_belong_to_no_unit_of_their_own(tmp_path: Path) -> None:
    contents = ['{"text": "a"}\n' + "\n" * 500, "\n" * 500 + '{"text": "b"}\n' + "\n" * 500]
    paths = []
    for number, content in enumerate(contents):
        paths.append(str(tmp_path / f"{number}.jsonl"))
        Path(paths[-1]).write_text(content)
    for size in (1, 100, 700, 5000):
        found = read_units(plan_units(paths, unit_bytes=size)[1])
        assert found == [(paths[0], 1, "a"), (paths[1], 501, "b")]


pieces = st.lists(
    st.sampled_from(
        [b"\n", b" ", b"\r\n", b"\t", b"\v", b"\x1c", b"a", b" a", b"a ", b"\xef\xbb\xbf", b"\0"]
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(pieces=pieces, chunk_bytes=st.integers(4, 40))
def test_the_scan_finds_the_records_that_are_read_later(pieces: list[bytes], chunk_bytes: int) -> None:
    data = b"".join(pieces)
    chunks = list(scan_lines("x", io.BytesIO(data), bytearray(chunk_bytes), json=False))
    records = list(iter_records(io.BytesIO(data), separated=False))
    assert np.concatenate([sizes_N for sizes_N, _ in chunks]).tolist() == [len(record) for record in records]
    records[0] = records[0].removeprefix(b"\xef\xbb\xbf")
    assert np.concatenate([documents_N for _, documents_N in chunks]).tolist() == [
        not is_blank(record, separated=False) for record in records
    ]


def test_a_line_longer_than_any_buffer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_file(path, ["x" * (5 << 20), "short"])
    (file,), units = plan_units([str(path)], unit_documents=1)
    assert (file.num_documents, file.num_blank) == (2, 1)
    assert [len(text) for _, _, text in read_units(units)] == [5 << 20, 5]


def test_bytes_of_bad_lines(tmp_path: Path) -> None:
    bad: list[BadLine] = []
    lines = [b'\xef\xbb\xbf{"text": 1}\r\n', b'{"text": "caf\xc3\xa9"}\n', b'{"text": "\xff"}\n', b"no JSON"]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xff\xff<|endoftext|>\n\xff")
    column = pyarrow.array([["ab", None], None, ["a"]])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "c.parquet")
    _, units = plan_units([str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.parquet")])
    assert len(units) == 1
    documents = list(read_unit(units[0], ["text"], on_bad=bad.append))
    assert [document.fields["text"] for document in documents] == [["caf\u00e9"], ["a"]]
    assert [line.num_bytes for line in bad] == [len(lines[0]) - 3, len(lines[2]), 7, 15, 2, 2, 0]


def test_bytes_of_bad_parquet_strings(tmp_path: Path) -> None:
    offsets = pyarrow.py_buffer(np.array([0, 3, 5, 6], np.int32).tobytes())
    strings = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"one\xe9 2")]
    )
    for name, column in (("plain", strings), ("dictionary", strings.dictionary_encode())):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        bad: list[BadLine] = []
        list(read_unit(plan_units([str(path)])[1][0], ["text"], on_bad=bad.append))
        assert [line.num_bytes for line in bad] == [2]


def test_no_file_stays_open(tmp_path: Path) -> None:
    rng = random.Random(0)
    paths = []
    for number in range(40):
        paths.append(str(tmp_path / f"{number}{rng.choice(SUFFIXES)}"))
        write_file(Path(paths[-1]), ["a", "b", "c"])
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n')[:-4])  # truncated
    read_units(plan_units(paths[:5])[1])  # what the libraries open for good
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DataFormatError, match=r"z\.jsonl\.gz"):
        plan_units([*paths, str(tmp_path / "z.jsonl.gz")])
    for _ in range(3):
        read_units(plan_units(paths, unit_documents=7)[1])
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # one compressed stream waits for the next unit


def test_what_a_plan_remembers_of_a_file_is_small(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number:05d}.jsonl").write_bytes(b'{"text": "a"}\n')
    pattern = str(tmp_path / "*.jsonl")
    plan_units(expand_inputs([pattern])[:1])
    tracemalloc.start()
    try:
        planned = plan_units(expand_inputs([pattern]))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(planned[1]) == 1
    assert kept / 3000 < 600, f"{kept / 3000} bytes a file, its name included"


def test_many_text_files_do_not_flood_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for number in range(200):
        (tmp_path / f"{number:03d}.txt").write_text("two\nlines\n")
    plan_units(expand_inputs([str(tmp_path / "*.txt")]))
    assert len(caplog.records) <= 10
    assert "192 more text files: 384 documents, one a line" in caplog.text
    assert "000.txt and 199 more files: every line is taken as a document" in caplog.text


def test_a_link_to_a_file_is_the_file_but_a_hard_link_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    os.link(tmp_path / "a.jsonl", tmp_path / "hard.jsonl")
    assert len(expand_inputs([str(tmp_path / "*.jsonl")])) == 2
    os.symlink("a.jsonl", tmp_path / "soft.jsonl")
    with pytest.raises(DataFormatError, match=r"soft\.jsonl: is named twice"):
        expand_inputs([str(tmp_path / "*.jsonl")])


def test_thousands_of_faults_fit_a_message(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"\.\.\. and 900 more$"):
        expand_inputs([str(tmp_path / f"{number}.jsonl") for number in range(1000)])
