"""``tools/train.py`` and its data: datasets named by what they are made from, index cache, dry-run table."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import run_ranks

from megatron_tokedit.cli.train import main
from megatron_tokedit.cli.train_report import known_sources
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset.sources import missing_sources
from megatron_tokedit.testing.models import write_hf_llama

ROOT = Path(__file__).resolve().parents[2]
TINY = "examples/tiny_cpu.yaml"


@pytest.fixture(autouse=True)
def _project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def raw(folder: Path, *overrides: str, run: str = "run") -> list[str]:
    """Arguments of the shipped example with its sources' places left to the program."""
    corpus, heldout = folder / "corpus.jsonl", folder / "heldout.jsonl"
    for path in (corpus, heldout):
        if not path.exists() and not (folder / "gone").exists():
            path.write_bytes((ROOT / "examples" / "tiny_cpu" / path.name).read_bytes())
    return [
        *("--config", TINY, f"run_dir={folder}/{run}", f"data.prepared_dir={folder}/prepared"),
        *("data.train.0.prefix=null", f"data.train.0.input=[{corpus}]"),
        *("data.validation.0.prefix=null", f"data.validation.0.input=[{heldout}]"),
        *overrides,
    ]


def config(arguments: list[str]) -> RunConfig:
    return known_sources(load_config(TINY, arguments[2:]))


def prefixes(arguments: list[str]) -> list[str | None]:
    """Of the training source and the validation source, as far as they are known."""
    data = config(arguments).data
    return [source.prefix for source in (*data.train, *data.validation)]


def made(folder: Path) -> list[str]:
    """The datasets that are there."""
    return sorted(str(path.relative_to(folder)) for path in (folder / "prepared").rglob("*_document.idx"))


def prepare(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*arguments, "--prepare"]) == 0
    return capsys.readouterr().err


def test_two_runs_share_a_dataset_and_a_change_makes_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = raw(tmp_path)
    assert prefixes(first) == [None, None]
    assert len(missing_sources(config(first))) == 2
    assert "preparing source docs" in prepare(first, capsys)
    both = made(tmp_path)
    assert len(both) == 2
    assert missing_sources(config(first)) == []
    assert "nothing to prepare" in prepare(raw(tmp_path, "data.train.0.name=else", run="other"), capsys)
    assert made(tmp_path) == both
    assert "preparing" in prepare(raw(tmp_path, "data.train.0.edit.append_eod=false"), capsys)
    assert len(made(tmp_path)) == 3
    (tmp_path / "prepared").rename(tmp_path / "moved")
    moved = raw(tmp_path, f"data.prepared_dir={tmp_path}/moved")
    assert "nothing to prepare" in prepare(moved, capsys)


def test_identity_is_the_content_of_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = raw(tmp_path)
    prepare(arguments, capsys)
    known, both = prefixes(arguments), made(tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    os.utime(corpus, (1, 1))
    assert prefixes(arguments) == [None, known[1]], "it has to be read again"
    assert "nothing to prepare" in prepare(arguments, capsys)
    assert (prefixes(arguments), made(tmp_path)) == (known, both)
    renamed = raw(tmp_path, f"data.train.0.input=[{corpus.rename(tmp_path / 'renamed.jsonl')}]")
    assert "nothing to prepare" in prepare(renamed, capsys)
    with (tmp_path / "renamed.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert "preparing source docs" in prepare(renamed, capsys)
    assert len(made(tmp_path)) == 3
    assert prefixes(renamed)[0] not in known


def test_input_that_is_gone_is_no_reason_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = raw(tmp_path)
    prepare(arguments, capsys)
    known = prefixes(arguments)
    (tmp_path / "gone").touch()
    (tmp_path / "corpus.jsonl").unlink()
    assert prefixes(arguments) == known
    assert "nothing to prepare" in prepare(arguments, capsys)
    other = raw(tmp_path, "data.train.0.edit.append_eod=false")
    assert main([*other, "--prepare"]) == 1
    message = capsys.readouterr().err
    assert "data.train.0 (docs): cannot use the input" in message
    assert "corpus.jsonl: does not exist" in message


@pytest.mark.usefixtures("forked_workers")
def test_edited_sources_are_known_by_their_prior(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same weights elsewhere are the same prior; others are not."""
    priors = [write_hf_llama(tmp_path / f"prior{seed}", vocab_size=1024, seed=seed) for seed in (1, 2)]
    edit = ("data.train.0.edit.edit_strategy=up_revise", "data.train.0.edit.prior_device=cpu")

    def arguments(prior: Path) -> list[str]:
        return raw(tmp_path, *edit, f"data.train.0.edit.prior={prior}")

    prepare(arguments(priors[0]), capsys)
    (first,) = (prefix for prefix in made(tmp_path) if "up_revise" in prefix)
    manifest = json.loads((tmp_path / first).with_suffix(".manifest.json").read_text())
    assert manifest["edit"]["strategy"] == "up_revise"
    moved = priors[0].rename(tmp_path / "moved")
    assert "nothing to prepare" in prepare(arguments(moved), capsys)
    assert "preparing source docs" in prepare(arguments(priors[1]), capsys)
    assert len([prefix for prefix in made(tmp_path) if "up_revise" in prefix]) == 2


def test_dry_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = raw(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"to be made first: docs, a dataset in {tmp_path}/prepared, from {tmp_path}/corpus.jsonl" in shown
    assert main([*arguments, "--dry-run", "--build-index"]) == 1
    assert "--build-index: datasets have to be made first" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_progress_of_a_job_whose_place_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = raw(tmp_path, "data.train.0.edit.unit_documents=30")
    prepare(arguments, capsys)
    prefix = prefixes(arguments)[0]
    assert prefix is not None
    for suffix in (".idx", ".bin"):
        os.unlink(prefix + suffix)

    def progress() -> str:
        script = (
            "import sys; from megatron_tokedit.cli.train import main; code = main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules; sys.exit(code)"
        )
        command = [sys.executable, "-c", script, *arguments, "--progress"]
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout

    assert progress() == f"{tmp_path}/run: step 0 of 40; preparing docs: 0 of 4 units\n"


MEETING = """
import sys, time
from megatron_tokedit.cli import train_sources
from megatron_tokedit.errors import TokeditError

class Slow:
    def __init__(self, store):
        self.store = store
    def __getattr__(self, name):
        return getattr(self.store, name)
    def get(self, key):
        time.sleep(1)
        return self.store.get(key)

def action():
    if sys.argv[1] == "fail":
        raise TokeditError("no room")
    return {"there": "yes"}

with train_sources.Ranks("test") as ranks:
    if ranks.rank == 1:
        ranks._store = Slow(ranks._store)
    print(ranks.from_rank_zero("look", action))
"""


@pytest.mark.parametrize("outcome", ["succeed", "fail"])
def test_the_host_of_the_ranks_meeting_leaves_last(outcome: str) -> None:
    """Two ranks without torchrun, the second one slow to read what the first one found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pair = []
    for rank in ("0", "1"):
        environment = os.environ | {
            "RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = [sys.executable, "-c", MEETING, outcome]
        pair.append(
            subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    shown = [process.communicate(timeout=120)[0] for process in pair]
    if outcome == "succeed":
        assert shown == ["{'there': 'yes'}\n"] * 2
    else:
        assert "TokeditError: no room" in shown[0]
        assert "preparing the data failed on rank 0: TokeditError: no room" in shown[1]


def test_build_index_then_train_on_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prepared by two ranks; the cache that one process builds is all that the ranks read."""
    steps = ("training.train_steps=2", "schedule.lr_warmup_steps=1")
    arguments = raw(tmp_path, *steps, "data.train.0.edit.unit_documents=30")

    done = run_ranks(2, ["tools/train.py", *arguments, "--prepare"])
    assert done.returncode == 0, done.stderr
    assert main([*arguments, "--dry-run", "--build-index"]) == 0
    shown = capsys.readouterr().out
    assert f"index cache: {tmp_path}/run/index_cache is complete for this run" in shown
    assert "step 2: learning rate" in shown
    files = sorted((tmp_path / "run" / "index_cache").rglob("*"))
    assert files
    done = run_ranks(2, ["tools/train.py", *arguments])
    assert done.returncode == 0, done.stderr
    assert "finished: 2 steps" in done.stderr
    assert sorted((tmp_path / "run" / "index_cache").rglob("*")) == files
    record: dict[str, Any] = json.loads(
        next((tmp_path / "run" / "checkpoints").glob("step*/run_config.json")).read_text()
    )
    assert record["data"]["train"][0]["prefix"] == prefixes(arguments)[0]
    capsys.readouterr()
    assert main([*arguments, "training.train_steps=4", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"goes on after step 2 of 4: {tmp_path}/run/checkpoints/step" in shown
    table = [line.split() for line in shown.splitlines() if line.startswith("docs ")]
    assert table == [["docs", "94", "31,026", "100.0%", "2,048", "4,096", "0.13"]]
    assert main([*arguments, "model.num_layers=2", "--dry-run"]) == 1
    assert "cannot be resumed under this configuration" in capsys.readouterr().out


def test_a_cap_is_a_problem_of_the_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = raw(tmp_path, "data.train.0.max_epochs=1")
    prepare(arguments, capsys)
    assert main([*arguments, "--dry-run"]) == 1
    shown = capsys.readouterr().out
    assert "data.train.0.max_epochs (docs): 1 x 242 samples = 242 may be drawn, but of the run's 320" in shown
    assert "the largest training.train_steps that fits is 30: lower it" in shown
    assert main([*arguments, "training.train_steps=30", "--dry-run"]) == 0
