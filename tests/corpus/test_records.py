"""Single records that are easy to get wrong."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_tokedit.corpus import BadLine, plan_units, read_unit
from megatron_tokedit.corpus.records import BadRecord, parse_json_record


def test_a_number_that_python_refuses_to_read_is_a_bad_line() -> None:
    with pytest.raises(BadRecord, match="not usable JSON"):
        parse_json_record(b'{"text": "a", "n": ' + b"9" * 5000 + b"}", ["text"])


def test_parquet_with_a_dictionary_encoded_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pyarrow.array(["b", "a", None, "b"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    bad: list[BadLine] = []
    _, units = plan_units([str(path)])
    documents = [d for unit in units for d in read_unit(unit, ["text"], on_bad=bad.append)]
    assert [document.fields["text"] for document in documents] == [["b"], ["a"], ["b"]]
    assert [line.line for line in bad] == [3]
