"""Collapse experiments: which cells there are, that each is made once, and a whole one that is killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tokedit.cli import __main__ as commands
from megatron_tokedit.cli.collapse_experiment import main
from megatron_tokedit.config.collapse import CollapseConfig, load_collapse_config
from megatron_tokedit.errors import ConfigError, DataFormatError
from megatron_tokedit.experiments.cells import Bench, Cell, CellError, Commands, Store, in_order, make_cells
from megatron_tokedit.experiments.collapse import Experiment
from megatron_tokedit.experiments.collapse_cells import HumanText, Model, cut, first_words

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/collapse/tiny_cpu.yaml"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def config_of(*overrides: str) -> CollapseConfig:
    return load_collapse_config(CONFIG, overrides)


# ------------------------------------------------------------------------------------------- text


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 40))
def test_pieces_are_the_text_and_no_longer_than_allowed(text: str, size: int) -> None:
    pieces = list(cut(text, size))
    joined = "".join(pieces)
    assert text.startswith(joined)
    assert not text[len(joined) :].strip()
    assert all(0 < len(piece) <= size for piece in pieces)
    for piece, after in itertools.pairwise(pieces):  # no word is cut that would have fitted
        assert after[0] in " \n" or " " not in piece[1:] + after[:1]


def test_pieces_end_before_white_space() -> None:
    assert list(cut("one two three", 8)) == ["one two", " three"]
    assert list(cut("x" * 10, 4)) == ["xxxx", "xxxx", "xx"]
    assert list(cut("  ", 4)) == []


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 5))
def test_the_first_words_are_the_beginning_of_the_text(text: str, count: int) -> None:
    begin = first_words(text, count)
    assert text.startswith(begin)
    assert begin.split() == text.split()[:count]


def test_human_text_is_split_by_content_and_refuses_broken_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document number {i % 60}"}) for i in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    overrides = (f"human.domains={{one: [{tmp_path}/a.jsonl]}}", "human.held_out_share=0.3")
    cell = HumanText.of(config_of(*overrides).human)
    store = Store(tmp_path / "cells")
    make_cells([cell], store, Commands(1), at_once=1, on_done=lambda *_: None)
    train, held_out = (
        {json.loads(line)["text"] for line in (store.place(cell) / name).read_text().splitlines()}
        for name in ("corpus.jsonl", "held_out_one.jsonl")
    )
    assert not train & held_out
    assert len(train | held_out) == 60
    assert 5 < len(held_out) < 35
    result = store.result(cell)
    assert result is not None
    assert sum(result["domains"]["one"].values()) == 120  # twice there, twice kept

    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": \n')
    broken = HumanText.of(config_of(*overrides).human)
    assert broken.key != cell.key
    with pytest.raises(DataFormatError, match=r"a\.jsonl:2: "):
        make_cells([broken], store, Commands(1), at_once=1, on_done=lambda *_: None)


# ------------------------------------------------------------------------------------------- plan


def test_arms_share_what_is_the_same() -> None:
    config = config_of("seeds=[1, 2]", "generations=3", "mix_shares=[0, 0.5, 1]", "ablations={hot: {}}")
    measurements = Experiment(config).measurements()
    assert [(m.arm, m.point) for m in measurements if m.seed == 1] == [
        *((arm, n) for arm in ("synthetic", "accumulate", "edited") for n in (1, 2, 3)),
        *(("mix", share) for share in (0.0, 0.5, 1.0)),
        ("ablation", "unedited"),
        ("ablation", "hot"),
    ]
    key = {(m.arm, m.point): m.perplexity.key for m in measurements if m.seed == 1}
    first = key["synthetic", 1]
    assert first == key["accumulate", 1] == key["edited", 1] == key["mix", 0.0] == key["ablation", "unedited"]
    assert key["mix", 1.0] == key["synthetic", 2]
    assert len(set(key.values())) == len(key) - 5
    other = {m.perplexity.key for m in measurements if m.seed == 2}
    assert not other & set(key.values())
    cells = in_order([m.perplexity for m in measurements])
    place = {cell.key: index for index, cell in enumerate(cells)}
    assert all(place[parent.key] < place[cell.key] for cell in cells for parent in cell.parents)
    models = [cell for cell in cells if isinstance(cell, Model)]
    # a seed: the first, two more a chain (synthetic's second is the mix of 100 %), 50 %, the ablation
    assert len(models) == 2 * (1 + 2 + 2 + 2 + 1 + 1)


def test_a_setting_changes_the_cells_that_depend_on_it_and_no_others() -> None:
    def keys(*overrides: str) -> dict[tuple[str, Any], str]:
        return {
            (m.arm, m.point): m.perplexity.key
            for m in Experiment(config_of("seeds=[1]", *overrides)).measurements()
        }

    base = keys()
    hotter = keys("edit.edit_temperature=3.0")
    assert {where for where in base if base[where] != hotter[where]} == {("edited", n) for n in range(2, 6)}
    longer = keys("run.training.train_steps=600")
    assert not set(base.values()) & set(longer.values())
    assert keys("parallel_cells=1", "output_dir=elsewhere", "synthesis.batch_size=8") == base


def test_faults_are_reported_together_with_their_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of("edit.edit_treshold=0.9", "edit.prior=x", "run.optimiser={}", "mix_shares=[2.0, 2.0]")
    message = str(caught.value)
    for part in (
        "edit_treshold",
        "edit.prior: is the experiment's own",
        "run.optimiser",
        "mix_shares.0: got 2.0",
    ):
        assert part in message
    with pytest.raises(ConfigError, match=r"section run\n  - model\.hidden_size: 128 is not a multiple"):
        config_of("run.model.num_attention_heads=3")
    with pytest.raises(ConfigError, match=r"generation: unknown key .*did you mean generations"):
        config_of("generation=3")


# ------------------------------------------------------------------------------------------ cells


@dataclass(frozen=True, eq=False)
class Counted(Cell):
    """A cell that notes when it is made, and may fail."""

    name: str
    above: tuple[Cell, ...] = ()
    fails: bool = False
    log: Any = None

    @property
    def parents(self) -> Sequence[Cell]:
        return self.above

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": self.name}

    def make(self, bench: Bench) -> dict[str, Any]:
        self.log.append(self.name)
        if self.fails:
            raise CellError("broken")
        return {"after": [bench.result(parent)["name"] for parent in self.above], "name": self.name}


def test_cells_are_made_once_after_their_parents_and_a_failure_keeps_what_was_made(tmp_path: Path) -> None:
    log: list[str] = []
    a = Counted("a", log=log)
    b, c = Counted("b", (a,), log=log), Counted("c", (a,), fails=True, log=log)
    d = Counted("d", (b, c), log=log)
    store = Store(tmp_path)
    with pytest.raises(CellError, match="broken"):
        make_cells([d], store, Commands(1), at_once=1, on_done=lambda *_: None)
    assert log == ["a", "b", "c"]
    mended = Counted("d", (b, Counted("c", (a,), log=log)), log=log)
    assert mended.key == d.key
    make_cells([mended], store, Commands(1), at_once=2, on_done=lambda *_: None)
    assert log == ["a", "b", "c", "c", "d"]
    assert store.result(mended) == {"after": ["b", "c"], "name": "d"}


def test_a_failed_command_is_shown_with_its_end_and_a_stopped_one_is_ended(tmp_path: Path) -> None:
    running = Commands(threads=1)
    with pytest.raises(CellError, match=r"exit code 3; the end of .*\n\$ .*\nlast words"):
        running.run([sys.executable, "-c", "import sys; print('last words'); sys.exit(3)"], tmp_path / "log")
    threading.Timer(0.5, running.stop).start()
    begin = time.monotonic()
    with pytest.raises(CellError, match="exit code -15"):
        running.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    assert time.monotonic() - begin < 30
    with pytest.raises(CellError, match="stopped"):
        running.run([sys.executable, "-c", ""], tmp_path / "log")


def test_every_tool_is_a_command_of_the_package() -> None:
    assert sorted(commands.COMMANDS) == sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
    result = subprocess.run(
        [sys.executable, "-m", "megatron_tokedit.cli", "evalute"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "evaluate" in result.stderr


# ------------------------------------------------------------------------------------------ whole


def test_a_killed_experiment_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", CONFIG, "--smoke", f"output_dir={tmp_path}/out", "arms=[edited]"]
    arguments += ["edit.edit_threshold=0.01", "parallel_cells=1"]
    out = tmp_path / "out-smoke"
    process = subprocess.Popen(
        [sys.executable, "tools/collapse_experiment.py", *arguments], stderr=subprocess.PIPE, text=True
    )
    while not list(out.glob("cells/model-*/run/checkpoints/step_*")) and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "of 8 cells are made, and the same command goes on there" in errors
    assert not (out / "report.md").exists()
    made = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/cell.json")}
    assert made
    assert main([*arguments, "--dry-run", "--quiet"]) == 0
    assert f"{8 - len(made)} are to be made" in capsys.readouterr().out
    assert main([*arguments, "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in made.items())
    assert len(list(out.glob("cells/*/cell.json"))) == 8
    results = json.loads((out / "results.json").read_text())
    first, second = results["points"]
    assert (first["point"], second["point"]) == (1, 2)
    assert second["corpus"][0]["eligible"] > 0
    assert second["corpus"][0]["num_tokens"] == first["corpus"][0]["num_tokens"]
    assert first["mean"] == first["perplexity"]["average"][0] > 1
    assert first["standard_deviation"] is None
    assert "one seed: no error bar" in shown
    assert (out / "generations.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--quiet"]) == 0
    assert "; 0 are to be made" in capsys.readouterr().out
