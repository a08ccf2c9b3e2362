from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_tokedit.corpus import expand_inputs
from megatron_tokedit.errors import DataFormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "data[1].jsonl", "d.parquet.bak"):
        (tmp_path / name).write_text("x\n")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "e.jsonl.gz").write_bytes(b"")
    return tmp_path


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def test_order_is_as_given_and_globs_are_sorted(folder: Path) -> None:
    found = expand_inputs([f"{folder}/c.txt", f"{folder}/[ab].jsonl"])
    assert names(found) == ["c.txt", "a.jsonl", "b.jsonl"]


def test_an_existing_name_is_taken_literally(folder: Path) -> None:
    assert names(expand_inputs([f"{folder}/data[1].jsonl"])) == ["data[1].jsonl"]


def test_globs_reach_into_folders(folder: Path) -> None:
    assert names(expand_inputs([f"{folder}/**/*.gz"])) == ["e.jsonl.gz"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.jsonl", "missing.jsonl: does not exist"),
        ("*.csv", "matches no file"),
        ("deep", r"deep: is a directory; name its files, for example '.*/deep/\*.jsonl'"),
        ("d.parquet.bak", "the suffix is not supported; supported are .jsonl"),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        expand_inputs([f"{folder}/{pattern}"])


def test_a_pipe_is_refused_rather_than_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(DataFormatError, match=r"pipe\.jsonl: is a pipe"):
        expand_inputs([f"{folder}/pipe.jsonl"])


def test_all_faults_are_in_one_message(folder: Path) -> None:
    with pytest.raises(DataFormatError) as error:
        expand_inputs([f"{folder}/missing.jsonl", f"{folder}/a.jsonl", f"{folder}/deep"])
    assert "missing.jsonl" in str(error.value)
    assert "is a directory" in str(error.value)


def test_a_file_named_twice_is_refused(folder: Path) -> None:
    with pytest.raises(DataFormatError, match="named twice"):
        expand_inputs([f"{folder}/a.jsonl", f"{folder}/*.jsonl"])


def test_no_input_is_refused() -> None:
    with pytest.raises(DataFormatError, match="no input file"):
        expand_inputs([])
