"""Damage between the units and the merge: found, told with what to do, and mended by doing that."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_cases import VOCAB_SIZE, editing, output_bytes, settings, write_corpus

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.errors import PlanError
from megatron_tokedit.pipeline import run
from megatron_tokedit.testing.models import write_hf_llama

SUFFIXES = (".bin", ".idx", ".edits")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job whose units are done and not merged, and the same job to its end."""
    folder = tmp_path_factory.mktemp("done")
    write_corpus(folder / "corpus.jsonl", num_documents=9)
    prior = write_hf_llama(folder / "prior", vocab_size=VOCAB_SIZE)
    for name, stage in (("whole", "all"), ("out", "edit")):
        run(preprocess_config(settings(folder, name, **editing(prior))), stage=stage)
    return folder


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def replace(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "marker empty": lambda unit: (unit / "0000001.json").write_bytes(b""),
    "marker miscounts": lambda unit: replace(unit / "0000001.json", b'"documents_in":3', b'"documents_in":4'),
    "marker of another": lambda unit: shutil.copy(unit / "0000002.json", unit / "0000001.json"),
    "no .bin": lambda unit: (unit / "0000001_text.bin").unlink(),
    "no .idx": lambda unit: (unit / "0000001_text.idx").unlink(),
    "no .edits": lambda unit: (unit / "0000001_text.edits").unlink(),
    "short .bin": lambda unit: os.truncate(unit / "0000001_text.bin", 10),
    "a token of .bin": lambda unit: flip(unit / "0000001_text.bin", 20),
    "a document of .idx": lambda unit: flip(unit / "0000001_text.idx", -16),
    "a byte of .edits": lambda unit: flip(unit / "0000001_text.edits", 90),
    "files of another": lambda unit: [
        shutil.copy(unit / f"0000002_text{suffix}", unit / f"0000001_text{suffix}") for suffix in SUFFIXES
    ],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_found_and_mended_as_the_message_says(done: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "job"
    shutil.copytree(done, folder)
    config = preprocess_config(settings(folder, "out", **editing(done / "prior")))
    DAMAGES[damage](folder / "out.work/units/0000")
    with pytest.raises(PlanError, match=r"0000001.*run again") as caught:
        run(config)
    assert not (folder / "out_text_document.manifest.json").exists()
    told = re.search(r"remove (\S+0000001\.json)|^(\S+0000001\.json): the marker", str(caught.value))
    assert told, caught.value
    Path(told[1] or told[2]).unlink()
    run(config)
    assert output_bytes(folder, "out", suffixes=SUFFIXES) == output_bytes(folder, "whole", suffixes=SUFFIXES)


def test_a_plan_with_another_digit_is_refused(done: Path, tmp_path: Path) -> None:
    """The units of a recorded plan are taken over, so a wrong one would read the wrong lines."""
    folder = tmp_path / "job"
    shutil.copytree(done, folder)
    shutil.rmtree(folder / "out.work/units")
    replace(folder / "out.work/plan.json", b'"first_line":4', b'"first_line":5')
    config = preprocess_config(settings(folder, "out", **editing(done / "prior")))
    with pytest.raises(PlanError, match=r"plan.json.*checksum.*--restart"):
        run(config)
    run(config, restart=True)
    assert output_bytes(folder, "out", suffixes=SUFFIXES) == output_bytes(folder, "whole", suffixes=SUFFIXES)
