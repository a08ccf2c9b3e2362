"""Many small files and long inputs: one job, few units, memory that does not grow with the input."""

from __future__ import annotations

import logging
import subprocess
import sys
from array import array
from pathlib import Path

import orjson
import pytest
from pipeline_cases import VOCAB_SIZE, WORDS, editing, output_bytes, settings, write_corpus

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.corpus import expand_inputs, plan_units
from megatron_tokedit.dataset import read_manifest
from megatron_tokedit.errors import PlanError
from megatron_tokedit.pipeline import run
from megatron_tokedit.pipeline.plan import FORMAT_VERSION, Plan, load_plan
from megatron_tokedit.testing.models import write_hf_llama

NUM_FILES = 2000


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two thousand files of one document, and the same documents in one file."""
    folder = tmp_path_factory.mktemp("small")
    lines = write_corpus(folder / "corpus.jsonl", NUM_FILES).read_bytes().splitlines(keepends=True)
    for index, line in enumerate(lines):
        path = folder / f"{index // 100:02d}" / f"{index:04d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(line)
    return folder


def plan_of(folder: Path) -> Plan:
    inputs, units = plan_units(expand_inputs([f"{folder}/*/*.jsonl"]), unit_bytes=10_000)
    return Plan({"json_keys": ["text"]}, inputs, units, array("q", range(len(inputs))), {"states": {}})


def test_a_job_over_many_small_files(
    small_files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    small = {"input": [f"{small_files}/*/*.jsonl"], "unit_documents": None, "workers": 2}
    config = preprocess_config(settings(small_files, "small", **small))
    assert run(config).outcome == "merged"
    run(preprocess_config(settings(small_files, "one", unit_documents=1000)))
    assert output_bytes(small_files, "small") == output_bytes(small_files, "one")
    manifest = read_manifest(str(small_files / "small_text_document"))
    assert manifest is not None
    assert manifest.counts["num_documents"] == NUM_FILES
    plan = load_plan(small_files / "small.work" / "plan.json")
    assert plan is not None
    assert len(plan.inputs) == NUM_FILES
    assert len(plan.units) < 20
    assert len(caplog.records) < 30, caplog.text
    monkeypatch.setattr(
        "megatron_tokedit.pipeline.plan.plan_units", lambda *_, **__: pytest.fail("read again")
    )
    assert run(config).outcome == "already complete"


def test_a_plan_of_many_files_survives_its_file(small_files: Path) -> None:
    plan = plan_of(small_files)
    path = small_files / "plan.json"
    plan.save(path)
    assert orjson.loads(path.read_bytes())["inputs"][3]["path"].endswith("0003.jsonl")
    assert max(map(len, path.read_bytes().splitlines())) < 60_000  # so that it is read piece by piece
    loaded = load_plan(path)
    assert loaded == plan
    assert loaded is not None
    assert loaded.fingerprint == plan.fingerprint
    part = loaded.units[1].parts[0]
    assert any(part.path is file.path for file in loaded.inputs)  # one string for both


def test_only_paths_and_times_are_not_in_the_fingerprint(small_files: Path) -> None:
    plan = plan_of(small_files)
    text = orjson.dumps(
        {"inputs": [f.to_json() for f in plan.inputs], "units": [u.to_json() for u in plan.units]}
    )
    changes = {
        b'.jsonl"': (b'.moved"', True),
        b'"num_blank":0': (b'"num_blank":1', False),
        b'"first_line":1,': (b'"first_line":2,', False),
        b'"format":"jsonl"': (b'"format":"text_lines"', False),
        b'"sha256":"': (b'"sha256":"0', False),
        b'"unit_id":3,': (b'"unit_id":4,', False),
    }
    for old, (new, same) in changes.items():
        assert old in text
        fields = orjson.loads(text.replace(old, new, 1 if not same else -1))
        inputs = [type(plan.inputs[0]).from_json(item) for item in fields["inputs"]]
        units = [type(plan.units[0]).from_json(item) for item in fields["units"]]
        other = Plan(plan.settings, inputs, units, array("q", [7] * len(inputs)))
        assert (other.fingerprint == plan.fingerprint) == same, old


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"format_version": %d' % FORMAT_VERSION, b'"format_version": 2'),
        lambda data: data.replace(b'"units": [', b'"unit": [', 1),
        lambda data: b"",
        lambda data: data.replace(b'"num_bytes"', b'"bytes"', 1),
    ],
)
def test_a_damaged_plan_is_refused(small_files: Path, tmp_path: Path, damage) -> None:
    plan_of(small_files).save(tmp_path / "plan.json")
    data = (tmp_path / "plan.json").read_bytes()
    (tmp_path / "plan.json").write_bytes(damage(data))
    with pytest.raises(PlanError, match=r"plan\.json: not a plan of this version .*--restart"):
        load_plan(tmp_path / "plan.json")


MEASURED = """
import sys
from pathlib import Path
from megatron_tokedit.cli.preprocess_edit import main
assert main(sys.argv[1:]) == 0
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""  # ru_maxrss would count what this process held when it started the other one


def peak_mebibytes(folder: Path, name: str, num_bytes: int, flags: dict[str, object]) -> float:
    """Peak memory of a job in a process of its own over a corpus of so many bytes."""
    line = orjson.dumps({"text": " ".join(WORDS * 30)}) + b"\n"
    (folder / "corpus.jsonl").write_bytes(line * (num_bytes // len(line)))
    fields = settings(folder, name, unit_documents=None, **flags)
    arguments = ["--append-eod", "--input", str(folder / "corpus.jsonl")]
    for key, value in fields.items():
        if key not in ("append_eod", "input") and value is not None:
            arguments += [f"--{key.replace('_', '-')}", str(value)]
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1024


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    small, large = (
        peak_mebibytes(tmp_path, f"out{size}", size << 20, {"unit_bytes": 1 << 20}) for size in (4, 32)
    )
    assert large - small < 16, f"{small:.0f} MiB at 4 MiB of input, {large:.0f} MiB at 32 MiB"


def test_memory_does_not_grow_with_the_input_of_an_edit(tmp_path: Path) -> None:
    prior = write_hf_llama(tmp_path / "prior", vocab_size=VOCAB_SIZE)
    flags = editing(prior, unit_bytes=8 << 10, prior_context=64, prior_overlap=8, prior_batch_tokens=1024)
    small, large = (peak_mebibytes(tmp_path, f"out{size}", size << 10, flags) for size in (16, 128))
    assert large - small < 16, f"{small:.0f} MiB at 16 KiB of input, {large:.0f} MiB at 128 KiB"
