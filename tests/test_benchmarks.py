"""The benchmarks' formulas and command lines; their numbers are measured elsewhere."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from megatron.core import parallel_state

from megatron_tokedit.engine.initialize import current_context

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """Loads a script of the folder, under a name that no other module has."""
    before, known = list(sys.path), set(sys.modules)
    sys.path.append(str(FOLDER))
    loaded: dict[str, ModuleType] = {}

    def load(name: str) -> ModuleType:
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
            loaded[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    yield load
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.fixture
def command_line(monkeypatch):
    def give(line: str) -> None:
        monkeypatch.setattr(sys, "argv", line.split())

    return give


class Clock:
    """A clock that only work moves."""

    def __init__(self):
        self.now = 0.0

    def work(self, seconds):
        self.now += seconds


def test_turns_count_what_is_inside_the_clock(benchmark, monkeypatch):
    measuring, clock, order = benchmark("measuring"), Clock(), []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock.now)

    def contestant(name, seconds):
        def run():
            order.append(name)
            clock.work(seconds)

        return run

    seconds = measuring.in_turns(
        {"a": contestant("a", 2.0), "b": contestant("b", 3.0)},
        rounds=2,
        warmups=1,
        finish=lambda: clock.work(0.5),
        after=lambda: clock.work(100.0),
    )
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [2.5, 2.5], "b": [3.5, 3.5]}


def test_ratios_and_rates(benchmark):
    measuring = benchmark("measuring")
    assert measuring.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0
    assert measuring.net_rate((100, 2.0), (400, 4.0)) == 150.0
    assert math.isnan(measuring.net_rate((100, 2.0), (400, 2.4)))  # half a second of work is needed
    assert [measuring.number(v) for v in (1234567, 0.12345, 12.34, 1234.5, None, "x", math.nan)] == [
        "1,234,567", "0.123", "12.3", "1,234", "-", "x", "-",
    ]  # fmt: skip


def test_a_report_prints_and_writes(benchmark, tmp_path, capsys):
    measuring = benchmark("measuring")
    with measuring.Report("one", str(tmp_path / "one.json")) as report:
        report.table("part", ("tokens/s", "MFU"), [("ours", 1234.5, "50%"), ("a longer name", 7, None)])
        report.ratio("ours / theirs", 1.5, "rate")
        report.limit("copying", 10.0, "GB/s")
        report.skip("fp8", "no CUDA device")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "part           tokens/s  MFU",
        "ours              1,234  50%",
        "a longer name         7    -",
        "ours / theirs: 1.5 (rate)",
        "limit: copying 10.0 GB/s",
        "skipped: fp8: no CUDA device",
    ]
    content = json.loads((tmp_path / "one.json").read_text())
    assert content["ratios"] == [{"name": "ours / theirs", "value": 1.5, "wanted": "rate"}]
    assert content["skipped"] == [{"part": "fp8", "reason": "no CUDA device"}]
    with measuring.Report("two", str(tmp_path / "two.json"), is_quiet=True) as report:
        report.say("nothing")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "two.json").exists()


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("quickstart", 2_557_632),
        ("124m", 124_439_808),  # GPT-2's published count
        ("1b", 1_235_814_400),  # Llama 3.2's
        ("3b", 3_212_749_824),
        ("8b", 8_030_261_248),  # Llama 3.1's
    ],
)
def test_a_shape_is_one_model_on_both_sides(benchmark, name, num_parameters):
    from megatron_tokedit.engine.sizes import num_parameters as count

    shape = benchmark("shapes").SHAPES[name]
    with torch.device("meta"):
        network = benchmark("shapes").hf_model(shape)
    network.tie_weights()
    assert sum(p.numel() for p in network.parameters()) == num_parameters
    assert count(shape.model, shape.vocab_size) == num_parameters


def test_forward_operations_by_hand(benchmark):
    shapes = benchmark("shapes")
    per_token = 12 * (2 * 768 * 3 * 768 + 2 * 768 * 768 + 2 * 2 * 768 * 3072) + 2 * 768 * 50257
    attention = 12 * 4 * 768 * (1 + 2 + 3)  # three positions see one, two and three
    assert shapes.forward_flops(shapes.SHAPES["124m"], [4]) == pytest.approx(3 * per_token + attention)
    assert shapes.forward_flops(shapes.SHAPES["124m"], [4, 4]) == pytest.approx(
        2 * (3 * per_token + attention)
    )


def test_fewer_layers_where_memory_ends(benchmark):
    shapes = benchmark("shapes")

    def needed(model):
        return 10.0 + 5.0 * model.num_layers

    shape = shapes.SHAPES["8b"]
    assert shapes.layers_that_fit(shape, 41.0, needed) == 6
    assert shapes.layers_that_fit(shape, 14.0, needed) == 0
    assert shapes.layers_that_fit(shape, 1e9, needed) == 32
    assert shape.with_layers(6).words == "Llama-3.1-8B, 32 x 4096, of which 6 layers"
    assert shape.with_layers(32) is shape


def test_a_gpu_of_80_gib_holds_a_part_of_8b(benchmark, command_line):
    train_step, shapes = benchmark("train_step"), benchmark("shapes")
    command_line("train_step.py --shape 8b --micro-batch-size 1")
    args = train_step.parse()
    shape = shapes.SHAPES["8b"]
    layers = shapes.layers_that_fit(
        shape, 0.9 * 85e9, lambda model: train_step.needed_bytes(model, shape.vocab_size, args)
    )
    # 18 bytes a parameter: 1.05 B of embeddings are 18.9 GB, a layer of 218 M is 3.9 GB and its activations
    assert 8 <= layers <= 12
    whole = train_step.needed_bytes(shapes.SHAPES["1b"].model, shape.vocab_size, args)
    assert 18 * 1.2358e9 < whole < 0.9 * 85e9


def commands() -> list[str]:
    spec = importlib.util.spec_from_file_location("benchmark_list", FOLDER / "run_all.py")
    sys.path.append(str(FOLDER))
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return [*module.CPU_RUNS, *module.GPU_RUNS]


@pytest.mark.parametrize("line", commands())
def test_what_run_all_runs_is_understood(benchmark, command_line, line):
    command_line(f"{line} --json found.json")
    assert benchmark(line.partition(".py")[0]).parse().json == "found.json"


def test_every_script_is_run_by_run_all(benchmark):
    scripts = {path.name for path in FOLDER.glob("*.py") if "def main()" in path.read_text()}
    assert scripts - {"run_all.py"} == {line.split()[0] for line in commands()}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("score.py --text a.txt", "--text needs --tokenizer"),
        ("train_step.py --recipe fp7", "invalid choice: 'fp7'"),
        ("editing.py --shape 7b", "invalid choice: '7b'"),
        ("generation.py --new-tokens 1000", "the shape has 1024 positions"),
    ],
)
def test_wrong_command_lines(benchmark, command_line, capsys, line, fault):
    command_line(line)
    with pytest.raises(SystemExit) as stopped:
        benchmark(line.partition(".py")[0]).parse()
    assert stopped.value.code == 2
    assert fault in capsys.readouterr().err


def test_defaults_depend_on_the_device(benchmark, command_line):
    score = benchmark("score")
    command_line("score.py --device cuda --only Megatron")
    args = score.parse()
    assert (args.processes, args.batch_tokens, args.dtypes) == (1, 16384, ["bfloat16", "fp8"])
    assert all("(Megatron)" in name for name in args.contestants)
    command_line("score.py --only ours")
    args = score.parse()
    assert (args.batch_tokens, args.dtypes) == (2048, ["float32", "bfloat16"])
    assert {"ours (Megatron), float32", "ours (Megatron), bfloat16"} <= set(args.contestants)


@pytest.fixture
def no_engine():
    """Ends the engine that another test of this process may have begun, and the one that is begun here."""

    def end():
        if parallel_state.is_initialized():
            current_context(owns_process_group=True).destroy()

    end()
    yield
    end()


@pytest.mark.usefixtures("no_engine")
def test_all_ways_of_writing_choose_the_same_tokens(benchmark, command_line, tmp_path):
    generation = benchmark("generation")
    command_line(
        f"generation.py --shape quickstart --layers 1 --batch 2 --prompt-tokens 5 --new-tokens 6 --rounds 1 "
        f"--json {tmp_path}/found.json"
    )
    with torch.random.fork_rng():
        generation.main()
    found = json.loads((tmp_path / "found.json").read_text())
    (table,) = found["tables"]
    assert [(row[0], row[3]) for row in table["rows"]] == [
        ("ours, cached", "100%"),
        ("transformers generate", "100%"),
        ("ours, no cache", "100%"),
    ]
    hidden, vocabulary = 192, 2048
    layer = 4 * hidden * hidden + 3 * hidden * generation.SHAPES["quickstart"].model.ffn_size + 2 * hidden
    gigabytes = 4 * (layer + hidden + vocabulary * hidden) / 1e9  # the embedding is looked up, not read
    assert f"reading {gigabytes:.2f} GB" in found["limits"][1]["name"]
    assert [ratio["name"] for ratio in found["ratios"]] == [
        "ours, no cache / ours, cached, 2 row(s), float32",
        "transformers generate / ours, cached, 2 row(s), float32",
    ]


def test_a_model_is_converted_both_ways_and_copied(benchmark, command_line, tmp_path, monkeypatch):
    conversion = benchmark("conversion")
    shapes = sys.modules[conversion.Shape.__module__]  # as its child will know them
    monkeypatch.setattr(conversion, "shape_of", lambda layers: shapes.SHAPES["quickstart"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command_line(f"conversion.py --rounds 1 --folder {tmp_path} --json {tmp_path}/found.json")
    conversion.main()
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row[0]: row[1:] for row in found["tables"][0]["rows"]}
    assert rows["to Megatron"][2] >= rows["to Megatron"][3] > 0.1
    assert rows["copy, synced"][2:] == [None, None]
    assert not list(tmp_path.glob("tmp*")), "what was written is gone"


def test_contestants_of_a_training_step(benchmark, command_line):
    train_step = benchmark("train_step")
    command_line("train_step.py --recipe bf16 fp8_tensorwise")
    args = train_step.parse()
    one = [("ours", "bf16"), ("bare", "bf16"), ("hf", "bf16")]
    two = [("ours", "fp8_tensorwise"), ("bare", "fp8_tensorwise")]
    assert train_step.contestants_of(args, 1) == one + two
    assert train_step.contestants_of(args, 2) == one[:2] + two


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize(
    "line",
    [
        "score.py --device cuda --shape 8b",
        "editing.py --device cuda --shape 8b",
        "train_step.py --shape 1b",
        "generation.py --device cuda --shape 8b",
    ],
)
def test_a_part_that_the_machine_lacks_is_one_line(benchmark, command_line, capsys, tmp_path, line):
    command_line(f"{line} --json {tmp_path}/found.json")
    benchmark(line.partition(".py")[0]).main()
    (printed,) = capsys.readouterr().out.splitlines()
    assert printed.startswith("skipped: ")
    assert printed.endswith(": no CUDA device is usable here")
    (skipped,) = json.loads((tmp_path / "found.json").read_text())["skipped"]
    assert skipped["reason"] == "no CUDA device is usable here"


def test_run_all_goes_on_after_a_failure(benchmark, tmp_path, monkeypatch, capfd, command_line):
    run_all = benchmark("run_all")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "good.py").write_text(
        "import json, pathlib, sys\n"
        "found = {'ratios': [{'name': 'ours / theirs', 'value': 1.25, 'wanted': 'rate'}],\n"
        "         'skipped': [{'part': 'fp8', 'reason': 'no GPU'}]}\n"
        "pathlib.Path(sys.argv[sys.argv.index('--json') + 1]).write_text(json.dumps(found))\n"
    )
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    monkeypatch.setattr(run_all, "CPU_RUNS", ("bad.py --x 1", "slow.py", "good.py"))
    command_line(f"run_all.py --limit 2 --output {tmp_path}/all.json")
    assert run_all.main() == 1
    summary = capfd.readouterr().out.partition("\nratios to the baselines")[2].splitlines()
    cells = [line.split("  ") for line in summary[1:]]
    cells = [[cell.strip() for cell in row if cell] for row in cells]
    assert cells[:4] == [
        ["bad.py", "bad.py --x 1", "FAILED", "ended with code 3"],
        ["slow.py", "slow.py", "FAILED", "not done after 2 s"],
        ["good.py", "ours / theirs", "1.25", "rate"],
        ["good.py", "fp8", "skipped", "no GPU"],
    ]
    faults = [result["fault"] for result in json.loads((tmp_path / "all.json").read_text())]
    assert faults == ["ended with code 3", "not done after 2 s", None]


def test_jobs_side_by_side_share_the_text(benchmark, tmp_path):
    documents = [f"document {i}" for i in range(10)]
    contest = benchmark("scaling").Contest("tokenize", {"append_eod": True}, documents, tmp_path)
    jobs = contest.jobs("all", 1, 3)
    assert len({job["output_prefix"] for job in jobs}) == 3
    assert all(job["workers"] == 1 and job["append_eod"] for job in jobs)
    texts = [
        json.loads(line)["text"] for job in jobs for line in Path(job["input"][0]).read_text().splitlines()
    ]
    assert sorted(texts) == sorted(documents)
    other = benchmark("scaling").Contest("edit", {}, documents, tmp_path).jobs("all", 1, 3)
    assert len({job["output_prefix"] for job in jobs + other}) == 6
    assert "".join(benchmark("scaling").cut(["a" * 4500, "b"])) == "a" * 4500 + "b"


def test_no_text_twice(benchmark, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "more": "two", "number": 3}\n{"text": "one"}\n')
    (tmp_path / "b.txt").write_text("line\n" * 1000)
    corpus = benchmark("corpus")
    found = corpus.gather([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], 1.0)
    assert found[:2] == ["one", "two"]
    assert found[2] == "line\n" * (corpus.DOCUMENT_CHARACTERS // 5)
    assert len(set(found)) == len(found)
    assert corpus.gather([str(tmp_path / "a.jsonl")], 3e-6) == ["one"]
