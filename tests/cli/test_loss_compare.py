"""``tools/loss_compare.py``: tables, differences, tolerances, exit codes, plots."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tokedit.cli.loss_compare import main

ROOT = Path(__file__).resolve().parents[2]


def write_run(folder: Path, losses: dict[int, float | str], *, extra: bool = True) -> str:
    folder.mkdir()
    records = [{"kind": "train", "step": step, "loss": loss, "lr": 0.1} for step, loss in losses.items()]
    if extra:
        records.append({"kind": "validation", "step": 10, "held": {"loss": 2.0 + len(losses)}})
        records.append({"kind": "health", "step": 10, "event": "loss_spike", "samples": {"a, epoch 0": [1]}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """A run, an equal one, and one that is 0.001 higher from step 61 on and ends at step 90."""
    losses = {step: 5.0 / step for step in range(1, 101)}
    higher = {step: loss + 0.001 * (step > 60) for step, loss in losses.items() if step <= 90}
    return [
        write_run(tmp_path / "first", losses),
        write_run(tmp_path / "equal", losses),
        write_run(tmp_path / "higher", higher),
    ]


def test_equal_runs(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*runs[:2], "--tolerance", "0"]) == 0
    shown = capsys.readouterr().out
    assert "B - A: largest difference 0.000e+00 at step 1; mean 0.000e+00 over 100 step(s)" in shown
    assert "within the tolerance of 0" in shown


def test_three_runs(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(runs) == 0, "without a tolerance it only reports"
    shown = capsys.readouterr().out
    assert f"  C  {runs[2]}: steps 1-90" in shown
    rows = [line.split() for line in shown.splitlines() if line.split()[:1] == ["61"]]
    assert rows == [["61", "0.081967", "0.081967", "0.082967", "+0.000e+00", "+1.000e-03"]]
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("     ")][-1] == "100"
    assert "C - A: largest difference 1.000e-03 at step" in shown
    assert "mean 3.333e-04 over 90 step(s); steps of A alone: 91-100" in shown
    assert main([*runs, "--quiet"]) == 0
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == ["B - A", "C - A"]


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (["--tolerance", "0"], 1),
        (["--tolerance", "0.0009"], 1),
        (["--tolerance", "0.0011"], 0),
        (["--tolerance", "0.0011", "--relative"], 1),
        (["--tolerance", "0.03", "--relative"], 0),
        (["--tolerance", "0", "--last-step", "60"], 0),
        (["--tolerance", "0", "--first-step", "60", "--last-step", "61"], 1),
        (["--tolerance", "0", "--metric", "train/lr"], 0),
        (["--tolerance", "9", "--metric", "validation/held/loss"], 1),
    ],
)
def test_tolerance(runs: list[str], more: list[str], code: int) -> None:
    assert main([runs[0], runs[2], *more]) == code


def test_every_step(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*runs[:2], "--every", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if len(row) == 4 and row[0].isdigit()] == [str(n) for n in range(1, 101)]


def test_what_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", {1: 1.0, 2: "nan", 3: "inf"})
    same = write_run(tmp_path / "same", {1: 1.0, 2: "nan", 3: "inf"})
    other = write_run(tmp_path / "other", {1: 1.0, 2: 2.0, 3: "inf"})
    assert main([one, same, "--tolerance", "0"]) == 0
    assert main([one, other, "--tolerance", "1e9", "--plot", str(tmp_path / "plot.png")]) == 1
    assert "largest difference inf at step 2" in capsys.readouterr().out


def test_plot(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*runs, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert main([*runs, "--plot", str(tmp_path / "plot.docx")]) == 1
    assert "docx" in capsys.readouterr().err
    assert main([*runs, "--plot", str(tmp_path / "none" / "plot.png")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_errors(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([runs[0], str(tmp_path / "none")]) == 1
    assert "none: No such file" in capsys.readouterr().err
    assert main([*runs, "--metric", "train/los"]) == 1
    assert "there are: train/loss, train/lr, validation/held/loss" in capsys.readouterr().err
    apart = write_run(tmp_path / "apart", {200: 1.0}, extra=False)
    assert main([runs[0], apart]) == 1
    assert "have no step in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", [[], ["b", "--tolerance", "-1"], ["b", "--tolerance", "nan"], ["b", "--every", "0"]]
)
def test_wrong_usage(more: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["a", *more])
    assert end.value.code == 2


def test_the_tool_takes_a_live_file_and_needs_no_torch(runs: list[str]) -> None:
    file = Path(runs[1]) / "metrics.jsonl"
    with file.open("a") as live:
        live.write('{"kind": "train", "st')
    script = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script, "tools/loss_compare.py", runs[0], str(file), "--tolerance", "0"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert "within the tolerance" in result.stdout
