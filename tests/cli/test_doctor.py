"""``tools/doctor.py``: what it finds on this machine, on broken ones, and for a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tokedit.cli import doctor
from megatron_tokedit.engine import machine, preflight

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "examples" / "tiny_cpu.yaml")


@pytest.fixture(autouse=True)
def _fresh_probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The probe looks anew; megatron-core is imported by one test only, in a process of its own."""
    monkeypatch.setattr(machine, "megatron_fault", lambda: None)
    probe = preflight.probe  # imported before a test puts something else in its place
    probe.cache_clear()
    yield
    probe.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("transformer_engine", "apex")]:
        del sys.modules[name]


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = doctor.main(["--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def part(found: dict[str, Any], name: str) -> dict[str, str]:
    return next(part for part in found["parts"] if part["name"] == name)


def test_on_this_machine() -> None:
    """As a user runs it; megatron-core is really imported."""
    command = [sys.executable, "tools/doctor.py"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "no CUDA device" in done.stdout
    assert "megatron-core" in done.stdout
    assert "attention" in done.stdout
    assert "fp8_tensorwise  no" in done.stdout
    assert done.stdout.endswith("no faults found\n")


def test_names_kernels_and_packages(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "probe", lambda: machine.assumed("h100"))
    code, found = findings(capsys)
    assert code == 0
    assert found["machine"]["compute_capability"] == [9, 0]
    assert part(found, "linear layers")["kernel"].startswith("Transformer Engine's")
    assert part(found, "scoring, Megatron prior")["kernel"].endswith("and fp8")
    names = {package["name"]: package for package in found["packages"]}
    assert names["torch"]["version"]
    assert names["transformer-engine"]["extra"] == "fp8"
    assert "pytest" not in names, "what only development needs is no matter here"
    assert {answer["recipe"] for answer in found["recipes"] if answer["faults"]} == {"mxfp8"}


def test_a_broken_package_is_a_fault(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('no libcudart')")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, found = findings(capsys)
    assert code == 1
    engine, apex = found["faults"]
    assert "pip uninstall transformer-engine" in engine
    assert "pip uninstall apex" in apex


def test_versions_that_do_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    real = doctor._version
    versions = {"numpy": "1.20.0", "psutil": None, "transformer-engine": "2.5.0"}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    code, found = findings(capsys)
    assert code == 1
    assert found["faults"] == [
        "psutil is not installed: pip install 'psutil<8,>=5.9'",
        "numpy 1.20.0 is installed, and <3,>=1.26 is needed: pip install 'numpy<3,>=1.26'",
        "transformer-engine 2.5.0 is installed, and <2.12,>=2.9 is needed: "
        "pip install --no-build-isolation -e '.[fp8]'",
    ]


def test_a_megatron_that_cannot_be_imported(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "megatron_fault", lambda: "megatron-core 0.16.1 cannot be imported (X: y)")
    code, found = findings(capsys)
    assert (code, found["faults"]) == (1, ["megatron-core 0.16.1 cannot be imported (X: y)"])


def test_for_a_run(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "probe", lambda: machine.assumed("a100"))
    wrong = ("precision.recipe=fp8_delayed", "training.global_batch_size=7")
    code, found = findings(capsys, "--config", TINY, *wrong)
    assert code == 1
    batch, recipe = found["faults"]
    assert "training.global_batch_size: 7 is not a multiple" in batch
    assert "fp8_delayed needs compute capability 8.9, and the NVIDIA A100 has 8.0; use bf16" in recipe
    code, found = findings(capsys, "--config", TINY, "precision.cross_entropy_fusion_impl=native")
    assert code == 0
    assert part(found, "loss")["reason"] == "precision.cross_entropy_fusion_impl"


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--config", TINY]) == 0
    shown = capsys.readouterr().out
    assert f"# what each part will use under {TINY}" in shown
    assert "no faults found" in shown
    assert doctor.main(["--config", TINY, "precision.recipe=mxfp8"]) == 1
    shown = capsys.readouterr().out
    assert "# 1 fault(s)\n- precision.recipe: mxfp8 needs a GPU" in shown
    assert f"under {TINY}, as far as it is sound\n" in shown


def test_wrong_usage() -> None:
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["precision.recipe=bf16"])
    assert stopped.value.code == 2
