"""``tools/gpu_check.py``: its verdicts, its processes, its table, and all that a CPU can do of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_check_jobs
import numpy as np
import pytest
import torch

from megatron_tokedit.cli.gpu_check import command, main
from megatron_tokedit.cli.gpu_check.checks import Bench, Check, Verdict
from megatron_tokedit.cli.gpu_check.edge_cases import EDGE_CASES
from megatron_tokedit.cli.gpu_check.layer_checks import FP8_RECIPES, judge_linear, judge_masking
from megatron_tokedit.cli.gpu_check.packed_checks import judge_packing
from megatron_tokedit.cli.gpu_check.packed_jobs import packed_batch, row_lengths
from megatron_tokedit.cli.gpu_check.plan import all_checks
from megatron_tokedit.cli.gpu_check.prior_checks import judge_edits
from megatron_tokedit.cli.gpu_check.prior_jobs import HF_PRIOR
from megatron_tokedit.cli.gpu_check.runner import JobFailed, Runner, job
from megatron_tokedit.cli.gpu_check.sizes import CPU
from megatron_tokedit.cli.gpu_check.text_checks import judge_text
from megatron_tokedit.cli.gpu_check.text_jobs import CONVERTED
from megatron_tokedit.cli.gpu_check.training_checks import judge_first_steps, judge_gap, judge_resumption
from megatron_tokedit.conversion.architecture import to_theirs
from megatron_tokedit.conversion.layouts import Sizes
from megatron_tokedit.conversion.registry import ARCHITECTURES
from megatron_tokedit.dataset import IndexedDatasetWriter
from megatron_tokedit.testing.models import tiny_llama
from megatron_tokedit.testing.ranks import RankPool

ROOT = Path(__file__).resolve().parents[2]
NO_FP8 = {"num_linear": 0, "num_active": 0, "scalings": [], "num_fp8_weights": 0, "smallest_amax": None}

# ------------------------------------------------------------------------------------------- verdicts


def linear(fp8: float, bf16: float = 0.002) -> Verdict:
    parts = ("output", "input_grad", "weight_grad")
    return judge_linear({"bf16": dict.fromkeys(parts, bf16), "fp8": dict.fromkeys(parts, fp8)})


def test_an_fp8_layer_has_the_error_of_fp8() -> None:
    assert linear(0.037).faults == []
    assert linear(0.08).faults == ["FP8 output is 8.00% off, more than 6%"]
    assert len(linear(float("nan")).faults) == 3
    assert "bfloat16 output is 2.00% off" in linear(0.037, bf16=0.02).faults[0]


def test_an_fp8_layer_that_is_too_good_is_none() -> None:
    assert all("was not computed in FP8" in fault for fault in linear(0.002).faults)
    assert len(linear(0.002).faults) == 3


def test_a_mask_that_hides_and_is_needed() -> None:
    assert judge_masking({"masked": 0.01, "unmasked": 4.0, "logit": 5.0}).faults == []
    assert "a masked document's logits are 80.0% off" in judge_masking(
        {"masked": 4.0, "unmasked": 4.0, "logit": 5.0}
    ).faults[0]  # fmt: skip
    (fault,) = judge_masking({"masked": 0.0, "unmasked": 0.001, "logit": 5.0}).faults
    assert "the check would see nothing" in fault


def packing(**changes: float) -> list[str]:
    good = {
        "tokens": 840, "mean": 0.01, "worst": 0.07, "gradient": 0.03, "neighbours": 0.0, "own": 0.9,
        "without_borders": 1.7,
    }  # fmt: skip
    return judge_packing(good | changes).faults


def test_packed_rows_keep_conversations_apart() -> None:
    assert packing() == []
    assert packing(mean=0.5) == [
        "tokens' losses are 0.5000 nats off those of the conversations alone, more than 0.02"
    ]
    assert packing(worst=1.5)[0].startswith("a token's loss is 1.5000 nats off")
    assert packing(gradient=float("nan"))[0].startswith("the gradient is nan of its norm off")
    (fault,) = packing(neighbours=0.3)
    assert fault.endswith("another conversation of the microbatch: they see each other")
    for control in ("own", "without_borders"):
        (fault,) = packing(**{control: 0.0})
        assert fault.endswith("the check would see nothing")


def run_of(losses: list[float], **changes: object) -> dict[str, object]:
    return {
        "first_step": 1,
        "losses": losses,
        "grad_norms": [1.0] * len(losses),
        "skipped_steps": 0,
        "evidence": NO_FP8,
        "faults": [],
        "peak_memory_gib": 1.0,
    } | changes


FALLING = [6.0 - 0.1 * step for step in range(24)]


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (run_of(FALLING), None),
        (run_of([6.0] * 24), "the loss went from 6.000 to 6.000, expected 0.3 less"),
        (run_of([*FALLING[:5], float("nan"), *FALLING[6:]]), "a loss or a gradient norm is not finite"),
        (run_of([*FALLING[:5], None, *FALLING[6:]]), "a loss or a gradient norm is not finite"),
        (run_of(FALLING, skipped_steps=2), "2 steps made no update"),
        (run_of(FALLING, faults=["3 of 8 linear layers computed in FP8"]), "3 of 8 linear layers"),
    ],
)
def test_the_first_steps_of_a_run(run: dict[str, object], fault: str | None) -> None:
    faults = judge_first_steps(run, CPU).faults
    assert (faults == []) if fault is None else (len(faults) == 1 and fault in faults[0])


def test_the_gap_to_bf16_is_that_of_the_last_steps() -> None:
    shifted = [*[loss + 1.0 for loss in FALLING[:-6]], *[loss + 0.009 for loss in FALLING[-6:]]]
    verdict = judge_gap(run_of(FALLING), run_of(shifted), CPU)
    assert verdict.faults == []
    assert verdict.numbers["gap"] == pytest.approx(0.009)
    further = [loss - 0.011 for loss in FALLING]
    assert judge_gap(run_of(FALLING), run_of(further), CPU).faults == ["the gap of -0.0110 is more than 0.01"]
    without = run_of(FALLING, faults=["0 of 8 linear layers computed in FP8"])
    assert judge_gap(run_of(FALLING), without, CPU).faults == ["0 of 8 linear layers computed in FP8"]
    assert judge_gap(run_of(FALLING), run_of(FALLING[:9]), CPU).faults == ["a run made 9 of 24 steps"]
    assert judge_gap(run_of(FALLING), run_of([float("inf")] * 24), CPU).faults == ["a loss is not finite"]


def test_a_resumed_run_has_the_losses_of_the_one_that_was_saved() -> None:
    expected = FALLING[12:18]
    same = run_of(expected, first_step=13)
    assert judge_resumption(expected, same, 12, same_recipe=True).faults == []
    off = run_of([expected[0] + 0.02, *expected[1:]], first_step=13)
    assert judge_resumption(expected, off, 12, same_recipe=False).faults == []
    (fault,) = judge_resumption(expected, off, 12, same_recipe=True).faults
    assert fault == "the loss of the first step(s) is 0.0200 off, more than 0.002"
    anew = run_of(expected, first_step=1)
    assert judge_resumption(expected, anew, 12, same_recipe=True).faults == [
        "it made steps 1 to 6, expected 13 to 18"
    ]
    bad = run_of(expected, first_step=13, skipped_steps=1)
    assert judge_resumption(expected, bad, 12, same_recipe=True).faults


def edited(path: Path, tokens: np.ndarray, **changes: object) -> dict[str, object]:
    with IndexedDatasetWriter(str(path), np.uint16) as writer:
        writer.add_document([tokens])
        writer.finalize()
    return {"prefix": str(path), "changed": 500, "perplexity": 20.0} | changes


def test_edits_agree_within_the_margin(tmp_path: Path) -> None:
    tokens = np.arange(10_000, dtype=np.int32)
    few, many = tokens.copy(), tokens.copy()
    few[:9] = 0  # one of them is 0 already
    many[:300] = 0
    first = edited(tmp_path / "first", tokens)
    verdict = judge_edits(first, edited(tmp_path / "few", few, perplexity=20.001), "float32")
    assert verdict.faults == []
    assert verdict.numbers["edited_otherwise"] == 8
    assert verdict.numbers["share_of_changed"] == pytest.approx(8 / 500)
    others = edited(tmp_path / "many", many, perplexity=21.0, changed=700)
    faults = judge_edits(first, others, "bfloat16").faults
    assert [fault.split(" ")[0] for fault in faults] == ["299", "the"]
    assert "49.8% of those changed, more than 25%" in faults[0]
    assert judge_edits(first, others, "fp8").faults == []


def test_edits_of_few_tokens_that_have_nothing_in_common_are_not_alike(tmp_path: Path) -> None:
    tokens = np.arange(10_000, dtype=np.int32)
    one, other = tokens.copy(), tokens.copy()
    one[100:150], other[200:250] = 0, 0
    edits = [edited(tmp_path / name, ids, changed=50) for name, ids in (("one", one), ("other", other))]
    for margin in ("float32", "bfloat16", "fp8"):
        (fault,) = judge_edits(edits[0], edits[1], margin).faults
        assert "100 tokens were edited otherwise, 200.0% of those changed" in fault


def test_edits_that_cannot_be_compared(tmp_path: Path) -> None:
    tokens = np.arange(10_000, dtype=np.int32)
    first = edited(tmp_path / "first", tokens)
    assert "too few to compare" in judge_edits(first, first | {"changed": 3}, "fp8").faults[0]
    short = edited(tmp_path / "short", tokens[:-1])
    assert judge_edits(first, short, "fp8").faults == ["one has 10000 tokens, the other 9999"]


def written(**changes: Any) -> dict[str, Any]:
    return {"tokens": 400, "otherwise": 3, "largest_gap": 0.06, "largest_difference": 0.05} | changes


def test_written_text_may_differ_in_ties_alone() -> None:
    assert judge_text(written(), "bfloat16").faults == []
    assert len(judge_text(written(), "float32").faults) == 1
    (fault,) = judge_text(written(largest_gap=3.0), "bfloat16").faults
    assert fault == (
        "without the cache another token is the more probable by 3.000 nats, more than the 0.25 of a tie"
    )
    (fault,) = judge_text(written(otherwise=60), "bfloat16").faults
    assert fault == "without the cache 60 of 400 tokens would be others, more than 5%"
    assert len(judge_text(written(largest_gap=float("nan")), "bfloat16").faults) == 1
    assert "too few" in judge_text(written(tokens=9), "bfloat16").faults[0]


def test_weights_of_both_kinds_of_layers_become_the_same_llama() -> None:
    import torch

    hidden, heads, groups, head = 8, 4, 2, 3
    layer = "decoder.layers.0."
    shapes = {
        "embedding.word_embeddings.weight": (5, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (5, hidden),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}pre_mlp_layernorm.weight": (hidden,),
        f"{layer}self_attention.linear_qkv.weight": ((heads + 2 * groups) * head, hidden),
        f"{layer}self_attention.linear_proj.weight": (hidden, heads * head),
        f"{layer}mlp.linear_fc1.weight": (12, hidden),
        f"{layer}mlp.linear_fc2.weight": (hidden, 6),
    }
    local = {name: torch.randn(shape) for name, shape in shapes.items()}
    fused = dict(local)
    for old, new in (("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
                     ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")):  # fmt: skip
        fused[layer + new] = fused.pop(layer + old)
    model = tiny_llama(
        num_layers=1, hidden_size=hidden, num_attention_heads=heads, num_query_groups=groups, kv_channels=head
    )
    ours, theirs = (to_theirs(ARCHITECTURES["llama"], Sizes(model, 5), found) for found in (local, fused))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    qkv = local[f"{layer}self_attention.linear_qkv.weight"]
    rows = ours["model.layers.0.self_attn.q_proj.weight"]
    # two query heads a group, then its key and its value
    assert torch.equal(rows, torch.cat((qkv[: 2 * head], qkv[4 * head : 6 * head])))
    assert torch.equal(ours["model.layers.0.self_attn.v_proj.weight"][head:], qkv[-head:])


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_sizes_at_the_edges(recipe: str) -> None:
    for case in EDGE_CASES:
        faults = case.faults(recipe)
        if case.in_fp8 != "either":
            assert bool(faults) == (case.in_fp8 == "refused"), case.name
        assert all(fault.path[0] == "model" for fault in faults)
        assert case.faults("bf16") == []


# ------------------------------------------------------------------------------------------ processes


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RANK", "3")
    return Runner(tmp_path)


def test_a_job_runs_once_in_a_world_of_its_own(runner: Runner) -> None:
    wanted = job("count", gpu_check_jobs.count, limit_seconds=60, by=10)
    results: list[dict[str, object]] = []
    threads = [threading.Thread(target=lambda: results.append(runner.run(wanted))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{"marks": 10, "scale": "cpu", "rank": None}] * 3


def test_a_job_can_be_run_as_without_a_gpu(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    (runner.folder / "transformer_engine").mkdir()
    (runner.folder / "transformer_engine" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{runner.folder}")
    for name, hides, variable in (("hidden", True, ""), ("shown", False, "5")):
        wanted = job(name, gpu_check_jobs.look_for_gpu, limit_seconds=60, hides_gpu=hides)
        assert runner.run(wanted) == {"variable": variable, "found": not hides, "imported": not hides}


def test_a_job_that_fails_tells_why_every_time(runner: Runner) -> None:
    wanted = job("fail", gpu_check_jobs.fail, limit_seconds=60)
    for _ in range(2):
        with pytest.raises(JobFailed, match="job fail: ArithmeticError: no such number") as caught:
            runner.run(wanted)
        assert "in fail" in caught.value.details


def test_a_job_whose_process_dies_costs_itself_only(runner: Runner) -> None:
    with pytest.raises(JobFailed, match=r"job die: its process died \(signal SIGSEGV\)") as caught:
        runner.run(job("die", gpu_check_jobs.die, limit_seconds=60))
    assert "the last words" in caught.value.details
    assert runner.run(job("count", gpu_check_jobs.count, limit_seconds=60, by=1))["marks"] == 1


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_a_job_that_hangs_is_ended_with_its_children(runner: Runner) -> None:
    with pytest.raises(JobFailed, match="job hang: ended after 6 s"):
        runner.run(job("hang", gpu_check_jobs.hang, limit_seconds=6))
    assert gone(int((runner.folder / "grandchild").read_text()))


def test_closing_ends_what_is_under_way(runner: Runner) -> None:
    failures: list[str] = []

    def wait() -> None:
        with pytest.raises(JobFailed) as caught:
            runner.run(job("hang", gpu_check_jobs.hang, limit_seconds=600))
        failures.append(str(caught.value))

    thread = threading.Thread(target=wait)
    thread.start()
    mark, deadline = runner.folder / "grandchild", time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    runner.close()
    thread.join(timeout=20)
    assert failures == ["job hang: its process died (signal SIGKILL)"]
    assert gone(int(mark.read_text()))
    with pytest.raises(JobFailed, match="not started"):
        runner.run(job("count", gpu_check_jobs.count, limit_seconds=60, by=1))


# -------------------------------------------------------------------------------------------- command

MACHINE = {
    "probe": {"has_cuda": False, "faults": []},
    "recipes": {name: ["no CUDA device"] for name in FP8_RECIPES} | {"bf16": [], "fp32": []},
    "versions": {"torch": "2"},
}


def refuse(bench: Bench) -> Verdict:
    raise ZeroDivisionError("a mistake")


CHECKS = [
    Check("good", "one", lambda bench: Verdict({"loss": 1.5, "parts": {"a": 2}, "none": None})),
    Check("bad", "two", lambda bench: Verdict({}, ["too far off", "and late"])),
    Check("broken", "three", refuse),
    Check("alone", "four", lambda bench: Verdict({"rate": 12345.6}), runs_alone=True),
    Check("fp8", "five", refuse, recipes=("bf16", "fp8_delayed")),
    Check("gpu", "six", refuse, needs_gpu=True),
]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "all_checks", lambda: CHECKS)
    monkeypatch.setattr(Bench, "machine", MACHINE)


@pytest.mark.usefixtures("fakes")
def test_table_json_and_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    assert main(["--output", str(output), "--parallel", "3"]) == 1
    report = json.loads(output.read_text())
    statuses = {check["name"]: check["status"] for check in report["checks"]}
    assert statuses == {
        "good": "passed", "bad": "failed", "broken": "failed", "alone": "passed",
        "fp8": "skipped", "gpu": "skipped",
    }  # fmt: skip
    assert report["counts"] == {"passed": 2, "failed": 2, "skipped": 2}
    assert report["machine"]["versions"] == {"torch": "2"}
    by_name = {check["name"]: check for check in report["checks"]}
    assert by_name["bad"]["reasons"] == ["too far off", "and late"]
    assert "ZeroDivisionError" in by_name["broken"]["details"]
    assert by_name["gpu"]["reasons"] == ["no CUDA device"]
    table = capsys.readouterr().out
    assert "loss 1.5, parts (a 2)\n" in table
    assert "rate 12,346" in table
    assert "too far off; and late" in table
    assert "in refuse" in table
    assert "2 passed, 2 failed, 2 skipped" in table


def test_packed_rows_are_skipped_where_no_attention_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "machine", MACHINE | {"packing": ["sft.packing: no flash-attn"]})
    bench = Bench(Runner(tmp_path))
    assert Check("packed", "", refuse, packs_rows=True).lacking(bench) == ["sft.packing: no flash-attn"]
    assert Check("other", "", refuse).lacking(bench) == []
    monkeypatch.setattr(Bench, "machine", MACHINE | {"packing": []})
    assert Check("packed", "", refuse, packs_rows=True).lacking(bench) == []


@pytest.mark.usefixtures("fakes")
def test_skips_are_no_failures_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "good", "fp8", "g*"]) == 0
    assert main(["--only", "good", "fp8", "--no-skips"]) == 1
    assert main(["--only", "good", "--no-skips", "--quiet"]) == 0
    assert "broken" not in capsys.readouterr().out


@pytest.mark.usefixtures("fakes")
def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--only", "good", "nothing"], "no check is named nothing"),
        (["--parallel", "0"], "--parallel is a number"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err
    assert main(["--output", str(tmp_path / "no" / "out.json")]) == 1
    assert main(["--output", str(tmp_path)]) == 1
    assert f"--output: {tmp_path} cannot be written: Is a directory" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["--work-dir", str(tmp_path)]) == 1
    assert "is not an empty folder; give a new one" in capsys.readouterr().err
    assert main(["--work-dir", str(tmp_path / "file" / "new")]) == 1
    assert "new cannot be made: Not a directory" in capsys.readouterr().err


def interrupt(bench: Bench) -> Verdict:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("fakes")
def test_an_interrupt_keeps_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [*CHECKS, Check("stopped", "seven", interrupt, runs_alone=True), replace(CHECKS[3], name="late")]
    monkeypatch.setattr(command, "all_checks", lambda: checks)
    output = tmp_path / "out.json"
    assert main(["--output", str(output)]) == 130
    report = json.loads(output.read_text())
    assert (report["interrupted"], report["not_done"]) == (True, ["stopped", "late"])
    assert report["counts"] == {"passed": 2, "failed": 2, "skipped": 2}
    assert "interrupted: 2 checks were not done" in capsys.readouterr().out


@pytest.mark.usefixtures("fakes")
def test_what_is_installed_but_broken_is_not_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = "transformer_engine is installed but cannot be imported"
    broken = {"has_cuda": True, "faults": [fault]}
    recipes = {name: [fault] for name in ("bf16", "fp8_delayed")}
    monkeypatch.setattr(Bench, "machine", {"probe": broken, "recipes": recipes, "versions": {}})
    assert main(["--only", "fp8"]) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("failed   fp8 "))
    assert row.endswith(fault)


def test_the_list_has_every_check_once() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools/gpu_check.py"), "--list"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == [check.name for check in all_checks()]
    assert len(set(names)) == len(names)
    for part in ("linear_fp8_delayed", "loss_gap_fp8_tensorwise", "resume_fp8_tensorwise_bf16",
                 "resume_cpu_fp8_tensorwise", "priors_agree_float32", "score_rate_fp8"):  # fmt: skip
        assert part in names


def test_a_machine_that_cannot_be_looked_at_fails_every_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = replace(job("machine", gpu_check_jobs.fail, limit_seconds=60), name="machine")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr("megatron_tokedit.cli.gpu_check.checks.job", lambda *args, **kwargs: fail)
    output = tmp_path / "out.json"
    assert main(["--only", "machine", "train_bf16", "--output", str(output), "--quiet"]) == 1
    report = json.loads(output.read_text())
    assert report["machine"] == {"failed": "job machine: ArithmeticError: no such number"}
    assert [check["status"] for check in report["checks"]] == ["failed", "failed"]


# ------------------------------------------------------------------------------- what a CPU can do of it


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu_check")


@pytest.fixture(scope="module")
def do(ranks: RankPool, work: Path) -> Callable[..., dict[str, Any]]:
    """``do("training_jobs:train", run=...)`` does a job of the script in a warm process."""

    def run(name: str, /, **arguments: Any) -> dict[str, Any]:
        (numbers,) = ranks.run(gpu_check_jobs.on_rank, name, work, arguments, world_size=1)
        return numbers

    return run


@pytest.fixture(scope="module")
def trained(do: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    do("data_jobs:prepare_data")
    return do("training_jobs:train", run="bf16", recipe="bf16")


def test_a_run_learns_and_resumes(do: Callable[..., dict[str, Any]], trained: dict[str, Any]) -> None:
    assert judge_first_steps(trained, CPU).faults == []
    assert judge_gap(trained, trained, CPU).numbers["gap"] == 0.0
    stop = CPU.save_step + CPU.resumed_steps
    resumed = do(
        "training_jobs:train", run="resumed", recipe="bf16", start="bf16", start_step=CPU.save_step,
        exit_at_step=stop,
    )  # fmt: skip
    verdict = judge_resumption(
        trained["losses"][CPU.save_step : stop], resumed, CPU.save_step, same_recipe=True
    )
    assert verdict.faults == []
    assert verdict.numbers["first_gap"] == 0.0


@pytest.mark.usefixtures("trained")
def test_both_kinds_of_priors_edit_alike(do: Callable[..., dict[str, Any]]) -> None:
    do("prior_jobs:write_twin", run="bf16")
    edits = [
        do("prior_jobs:edit", name=name, prior=prior, dtype="float32")
        for name, prior in (("hf", HF_PRIOR), ("megatron", "bf16"))
    ]
    verdict = judge_edits(edits[0], edits[1], "float32")
    assert verdict.faults == []
    assert verdict.numbers["changed"] > 100
    assert verdict.numbers["share_of_changed"] < 0.02


@pytest.mark.usefixtures("trained")
def test_text_is_written_with_the_cache_as_without(do: Callable[..., dict[str, Any]]) -> None:
    for dtype in ("float32", "bfloat16"):
        verdict = judge_text(do("text_jobs:continue_texts", run="bf16", dtype=dtype), dtype)
        assert verdict.faults == []
        assert verdict.numbers["tokens"] > 200
    assert verdict.numbers["largest_difference"] > 0.0, "two computations, not one"


@pytest.mark.usefixtures("trained")
def test_a_run_leaves_as_a_hugging_face_folder(do: Callable[..., dict[str, Any]], work: Path) -> None:
    from transformers import AutoModelForCausalLM

    numbers = do("text_jobs:convert_run", run="bf16", dtype="bfloat16")
    twin = AutoModelForCausalLM.from_pretrained(work / CONVERTED)
    assert sum(p.numel() * 2 for p in twin.parameters()) == numbers["bytes"]


def test_masked_documents(do: Callable[..., dict[str, Any]]) -> None:
    assert judge_masking(do("layer_jobs:mask_documents", recipe="fp32")).faults == []


def test_packed_rows(do: Callable[..., dict[str, Any]]) -> None:
    for recipe in ("fp32", "bf16"):
        found = do("packed_jobs:pack_rows", recipe=recipe)
        assert judge_packing(found).faults == []
        assert found["neighbours"] == 0.0
        assert found["tokens"] == sum(map(sum, row_lengths(CPU.model["seq_length"])))
        assert found["gradient"] > 0.0, "two computations, not one"


def test_packed_rows_without_borders_are_found_out(ranks: RankPool, work: Path) -> None:
    (found,) = ranks.run(gpu_check_jobs.pack_without_borders, work, world_size=1)
    faults = judge_packing(found).faults
    assert len(faults) == 4
    assert "they see each other" in faults[3]


def test_the_rows_are_filled_up() -> None:
    """Lengths that fit at every scale, one of a single position, and padding that is a sequence too."""
    for row_length in (64, 512):
        assert all(length > 0 for lengths in row_lengths(row_length) for length in lengths)
        assert all(sum(lengths) < row_length for lengths in row_lengths(row_length))
    rows = [[torch.arange(10, 14), torch.arange(20, 22)], [torch.arange(30, 35)]]
    batch = packed_batch(rows, 6, has_borders=True)
    assert batch["tokens"].tolist() == [[10, 11, 12, 20, 0, 0], [30, 31, 32, 33, 0, 0]]
    assert batch["labels"].tolist() == [[11, 12, 13, 21, 0, 0], [31, 32, 33, 34, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1]]
    assert packed_batch(rows, 6, has_borders=False)["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_sizes_are_trained_and_a_failing_one_is_told(do: Callable[..., dict[str, Any]]) -> None:
    cases = [case.for_job() for case in EDGE_CASES if case.name in ("sequence 127", "sequence 8, one row")]
    cases.append({**cases[0], "name": "impossible", "model": {**cases[0]["model"], "num_layers": 0}})
    found = do("layer_jobs:train_at_edges", recipe="bf16", cases=cases)["cases"]
    assert len(found["sequence 127"]) == len(found["sequence 8, one row"]) == 2
    assert found["impossible"].startswith("ValidationError")


def test_rates(do: Callable[..., dict[str, Any]]) -> None:
    trained = do("rate_jobs:train_rate", recipe="bf16")
    assert trained["mfu"] == pytest.approx(trained["tflops"] / trained["peak_tflops"])
    do("rate_jobs:write_rate_prior")
    scored = do("rate_jobs:score_rate", dtype="bfloat16")
    assert scored["finite"]
    assert scored["tflops"] == pytest.approx(scored["share"] * scored["product_tflops"])


def test_fp8_is_skipped_on_a_cpu_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "out.json"
    assert main(["--only", "machine", "*fp8*", "resume_cpu_*", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    results = {check["name"]: check for check in report["checks"]}
    assert results.pop("machine")["status"] == "passed"
    assert {check["status"] for check in results.values()} == {"skipped"}
    assert "no CUDA device" in results["train_fp8_blockwise"]["reasons"][0]
    assert report["job_seconds"].keys() == {"machine"}


@pytest.mark.stress
def test_the_whole_script_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "out.json"
    code = main(["--output", str(output), "--work-dir", str(tmp_path / "work"), "--parallel", "2"])
    report = json.loads(output.read_text())
    results = {check["name"]: check for check in report["checks"]}
    faults = {name: check["reasons"] for name, check in results.items() if check["status"] == "failed"}
    assert (faults, code) == ({}, 0)
    assert {name for name, check in results.items() if check["status"] == "passed"} == {
        "machine", "edges_refused", "edges_bf16", "masked_documents", "packed_rows", "train_bf16",
        "resume_bf16_bf16", "train_rate_bf16", "generate_float32", "generate_bfloat16", "convert_bfloat16",
        "priors_agree_float32", "priors_agree_bfloat16", "score_rate_bfloat16",
    }  # fmt: skip
    assert results["edges_bf16"]["numbers"]["trained"] == len(EDGE_CASES)
