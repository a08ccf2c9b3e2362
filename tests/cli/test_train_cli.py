"""``tools/train.py`` from the outside: exit codes, messages, dry run, preparing, training and resuming."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forks import run_ranks

from megatron_tokedit.cli.train import main
from megatron_tokedit.cli.train_sources import outdated_sources
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.raw_sources import preprocessing_of
from megatron_tokedit.pipeline import run
from megatron_tokedit.testing.models import write_hf_llama
from megatron_tokedit.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = "examples/tiny_cpu.yaml"


@pytest.fixture(autouse=True)
def _project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def tiny(folder: Path, *overrides: str) -> list[str]:
    """Arguments of the shipped example, with everything it writes in ``folder``."""
    data = [
        f"data.{split}.0.prefix={folder}/data/{name}_text_document"
        for split, name in (("train", "corpus"), ("validation", "heldout"))
    ]
    return ["--config", TINY, f"run_dir={folder}/run", *data, *overrides]


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "tools/train.py",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=280,
    )


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--config", "--dry-run", "--prepare", "--progress", "--quiet", "section.field=value"):
        assert flag in shown


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config"],
        ["--config", TINY, "--dry-run", "--prepare"],
        ["--config", TINY, "--for-gpu", "h100"],
        ["--config", TINY, "--dry-run", "--world-size", "-4"],
        ["--config", TINY, "--world-size", "2"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_all_faults_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tiny(tmp_path, "model.num_layer=2", "optimizer.lr=fast", "training.global_batch_size=7")
    assert main(wrong) == 1
    message = capsys.readouterr().err
    assert "3 problems" in message
    assert "did you mean num_layers?" in message
    assert "Traceback" not in message
    assert not list(tmp_path.iterdir())


def test_dry_run_changes_nothing_and_says_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = tiny(tmp_path, "parallel.tensor_model_parallel_size=2", "--dry-run", "--world-size", "4")
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "vocab_size: 1024" in shown
    assert "layout: tensor 2 x pipeline 1 x data 2" in shown
    assert "8 sequences a step = 2 a microbatch x 2 microbatches x 2 data-parallel rank(s)" in shown
    assert "1,024 tokens a step, 40,960 in 40 steps" in shown
    assert "parameters: 328,256" in shown
    assert "memory a rank (estimate)" in shown
    assert "to be made first" in shown
    assert "no problems found" in shown
    assert not list(tmp_path.iterdir())


def test_fp8_is_refused_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run shows everything and what the machine lacks; a start says that with all other faults."""
    fp8 = ("precision.recipe=fp8_tensorwise", "precision.cuda_graph_impl=local")
    assert main(tiny(tmp_path, *fp8, "--dry-run")) == 1
    shown = capsys.readouterr().out
    assert "fp8_param_gather: true" in shown
    assert "# machine\nno CUDA device" in shown
    assert "# 2 problem(s)\n- precision.recipe: fp8_tensorwise needs a GPU of compute capability 8.9" in shown
    assert "- precision.cuda_graph_impl: local needs a GPU" in shown
    assert main(tiny(tmp_path, *fp8, "training.global_batch_size=7")) == 1
    message = capsys.readouterr().err
    assert "3 problems" in message
    assert "training.global_batch_size: 7 is not a multiple" in message
    assert "precision.recipe: fp8_tensorwise needs a GPU" in message
    assert "[override 'precision.recipe=fp8_tensorwise']" in message
    assert main(tiny(tmp_path, *fp8, "training.global_batch_size=7", "--dry-run")) == 1
    assert "3 problems" in capsys.readouterr().err, (
        "with other faults, a dry run says what the machine lacks too"
    )
    assert not list(tmp_path.iterdir())


def test_dry_run_for_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny(tmp_path, "precision.recipe=fp8_tensorwise", "--dry-run", "--for-gpu", "h100")) == 0
    shown = capsys.readouterr().out
    assert "assumed, not this machine: NVIDIA H100 (compute capability 9.0), CUDA 13.0" in shown
    assert "no problems found" in shown
    assert main(tiny(tmp_path, "precision.recipe=fp8_tensorwise", "--dry-run", "--for-gpu", "a100")) == 1
    assert (
        "fp8_tensorwise needs compute capability 8.9, and the NVIDIA A100 has 8.0" in capsys.readouterr().out
    )


def test_dry_run_reports_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_input = ("data.validation.0.input=null", "data.validation.0.edit=null")
    wrong = ("model.vocab_size=100", "data.train.0.input=[no/such.jsonl]", *no_input)
    arguments = tiny(tmp_path, *wrong, "--dry-run")
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "model.vocab_size: 100 ids cannot hold the tokenizer's 1024" in shown
    assert "no/such.jsonl" in shown
    assert "heldout_text_document.bin and .idx are not there" in shown
    assert "3 problem(s)" in shown


def test_dry_run_looks_for_the_prior(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = ("data.train.0.edit.edit_strategy=up_revise", "data.train.0.edit.prior=/no/such/prior")
    assert main(tiny(tmp_path, *edit, "--dry-run")) == 1
    assert "source docs: /no/such/prior: no such folder" in capsys.readouterr().out


def test_a_truncated_dataset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny(tmp_path, "--prepare")) == 0
    with (tmp_path / "data" / "corpus_text_document.bin").open("r+b") as file:
        file.truncate(40_000)
    assert main(tiny(tmp_path, "--dry-run")) == 1
    assert "corpus_text_document.bin: has 20000 tokens, its index says 31026" in capsys.readouterr().out


def test_prepare_then_dry_run_then_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny(tmp_path, "parallel.tensor_model_parallel_size=2", "--prepare")) == 0
    assert (tmp_path / "data" / "corpus_text_document.idx").is_file()
    assert not (tmp_path / "run").exists(), "nothing is trained"
    capsys.readouterr()
    assert main(tiny(tmp_path, "--prepare")) == 0
    assert "nothing to prepare" in capsys.readouterr().err
    assert main(tiny(tmp_path, "--dry-run")) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("docs ")]
    assert table == [["docs", "94", "31,026", "100.0%", "40,960", "1.32"]]
    assert main(tiny(tmp_path, "data.train.0.edit.append_eod=false", "--dry-run")) == 1
    assert "append_eod: recorded True, now False; put them back" in capsys.readouterr().out
    assert main(tiny(tmp_path, "data.train.0.edit.append_eod=false")) == 1
    assert "datasets that do not fit the configuration" in capsys.readouterr().err
    assert main(tiny(tmp_path, "--progress")) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run: step 0 of 40\n"


def test_a_dataset_of_another_prior_is_refused(tmp_path: Path) -> None:
    priors = [write_hf_llama(tmp_path / f"prior{seed}", vocab_size=1024, seed=seed) for seed in (1, 2)]
    edit = ("data.train.0.edit.edit_strategy=up_revise", "data.train.0.edit.prior_device=cpu")

    def outdated(prior: Path, *more: str) -> list[str]:
        overrides = (*edit, f"data.train.0.edit.prior={prior}", *more)
        return outdated_sources(load_config(TINY, tiny(tmp_path, *overrides)[2:]))

    config = load_config(TINY, tiny(tmp_path, *edit, f"data.train.0.edit.prior={priors[0]}")[2:])
    run(preprocessing_of(config.data.train[0], config.tokenizer))
    assert outdated(priors[0]) == []
    (problem,) = outdated(priors[1])
    assert f"prior.path: recorded {priors[0]}, now {priors[1]}; put them back" in problem
    (problem,) = outdated(priors[0], "data.train.0.edit.prior_dtype=bfloat16")
    assert "prior.dtype: recorded float32, now bfloat16" in problem
    moved = priors[0].rename(tmp_path / "moved")
    assert outdated(moved) == []
    assert outdated(priors[0]) == [], "gone, which is no reason to edit again"


def test_progress_counts_work_units_without_torch(tmp_path: Path) -> None:
    """What a requeued job compares: finished units move it while there is no step yet."""
    arguments = tiny(tmp_path, "data.train.0.edit.unit_documents=30")

    def progress() -> str:
        script = (
            "import sys; from megatron_tokedit.cli.train import main; code = main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules; sys.exit(code)"
        )
        command = [sys.executable, "-c", script, *arguments, "--progress"]
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout

    step = f"{tmp_path}/run: step 0 of 40"
    assert progress() == f"{step}; preparing docs: not begun; preparing heldout: not begun\n"
    config = load_config(TINY, arguments[2:])
    run(preprocessing_of(config.data.train[0], config.tokenizer), rank=0, world_size=2, stage="edit")
    assert progress() == f"{step}; preparing docs: 2 of 4 units; preparing heldout: not begun\n"
    assert main([*arguments, "--prepare"]) == 0
    assert progress() == f"{step}\n"


def test_world_size_must_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One plain process with TP 2: refused before anything is started."""
    assert main(tiny(tmp_path, "parallel.tensor_model_parallel_size=2")) == 1
    assert "1 ranks cannot be divided" in capsys.readouterr().err


def test_prepares_trains_and_resumes_on_four_ranks(tmp_path: Path) -> None:
    """The command of the README: raw text to a model under TP2 x PP2, stopped on the way and resumed."""
    layout = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
    steps = ("training.train_steps=4", "schedule.lr_warmup_steps=1", "logging.log_interval_steps=1")
    first = torchrun(4, *tiny(tmp_path, *layout, *steps, "runtime.exit_at_step=2"))
    assert first.returncode == 0, first.stderr
    assert "preparing source docs" in first.stderr
    assert "Warning" not in first.stderr
    assert "stopped by exit_at_step after step 2 of 4" in first.stderr
    second = run_ranks(4, ["tools/train.py", *tiny(tmp_path, *layout, *steps)])
    assert second.returncode == 0, second.stderr
    assert "resuming after step 2" in second.stderr
    assert "preparing" not in second.stderr
    assert "finished: 4 steps" in second.stderr
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == [1, 2, 3, 4]


def test_failed_preparation_ends_all_ranks(tmp_path: Path) -> None:
    corpus = tmp_path / "broken.jsonl"
    corpus.write_text('{"text": "good"}\n{"text": \n')
    result = torchrun(2, *tiny(tmp_path, f"data.train.0.input=[{corpus}]"))
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1, "one message, from rank 0"
    assert f"{corpus}" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gpu", [(), ("--for-gpu", "h100")])
def test_a_dry_run_beside_a_half_installed_package_ends_with_one_line(
    tmp_path: Path, gpu: tuple[str, ...]
) -> None:
    package = tmp_path / "packages" / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = subprocess.run(
        [sys.executable, "tools/train.py", *tiny(tmp_path, "--dry-run", *gpu)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(package.parent)}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "rror" in line]
    assert line.startswith(
        "error: transformer_engine is installed but cannot be imported (OSError: libcudart"
    )


def test_dry_run_names_tracking_packages_that_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    assert main(tiny(tmp_path, "logging.wandb.project=edits", "--dry-run")) == 1
    shown = capsys.readouterr().out
    assert (
        "- logging.wandb: the package wandb is not installed here; pip install 'megatron_tokedit[wandb]'"
        in shown
    )
    assert main(tiny(tmp_path, "logging.wandb.projct=edits", "--dry-run")) == 1
    assert "did you mean project?" in capsys.readouterr().err
