"""``tools/submit.py``: exact commands, and what is left to do; Slurm's own programs are small fakes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from submit_cases import ROOT, TINY, UNITS, Cluster, checkpoint, cluster_fixture, make_units_fixture

from megatron_tokedit.cli.submit import main
from megatron_tokedit.cli.submit_slurm import Slurm
from megatron_tokedit.pipeline.placement import array_expression

__all__ = ["cluster_fixture", "make_units_fixture"]

SETTINGS = {
    1: [
        'slurm.train={nodes: 1, gpus_per_node: 1, time: "4:00:00"}',
        "slurm.preprocess={tasks: 1}",
        "slurm.partition=gpu",
    ],
    2: [
        "slurm.train={nodes: 2, gpus_per_node: 2, cpus_per_task: 16, mem: 0, qos: long}",
        "slurm.preprocess={tasks: 16, max_running: 8, cpus_per_task: 8, mem: 64G, partition: cpu}",
        "slurm.merge={partition: cpu, mem: 8G}",
        "slurm.partition=gpu",
        "slurm.sbatch=[--mail-type=FAIL]",
    ],
    64: [
        "slurm.train={nodes: 64, gpus_per_node: 8, gres_type: h100, sbatch: [--switches=2, --exclusive]}",
        "slurm.preprocess={tasks: 500, gpus_per_node: 1, account: a1}",
        "training.global_batch_size=1024",
        "slurm.evaluate={gpus_per_node: 1, time: 1-0}",
        "slurm.account=a2",
    ],
}
EXPECTED = {
    1: {
        "preprocess": ["--array=0", "--nodes=1", "--partition=gpu"],
        "merge": ["--nodes=1", "--partition=gpu"],
        "train": ["--nodes=1", "--partition=gpu", "--gpus-per-node=1", "--time=4:00:00"],
    },
    2: {
        "preprocess": [
            *("--array=0-15%8", "--nodes=1", "--partition=cpu", "--cpus-per-task=8", "--mem=64G"),
            "--mail-type=FAIL",
        ],
        "merge": ["--nodes=1", "--partition=cpu", "--mem=8G", "--mail-type=FAIL"],
        "train": [
            *("--nodes=2", "--partition=gpu", "--qos=long", "--gpus-per-node=2", "--cpus-per-task=16"),
            *("--mem=0", "--mail-type=FAIL"),
        ],
    },
    64: {
        "preprocess": ["--array=0-499", "--nodes=1", "--account=a1", "--gpus-per-node=1"],
        "merge": ["--nodes=1", "--account=a2"],
        "train": ["--nodes=64", "--account=a2", "--gpus-per-node=h100:8", "--switches=2", "--exclusive"],
        "evaluate": ["--nodes=1", "--account=a2", "--gpus-per-node=1", "--time=1-0"],
    },
}
SCRIPTS = {
    "preprocess": ["slurm/preprocess_edit.sh"],
    "merge": ["slurm/preprocess_edit.sh", "--merge"],
    "train": ["slurm/pretrain_edited.sh"],
    "evaluate": ["slurm/evaluate.sh"],
}


def expected_calls(cluster: Cluster, nodes: int, arguments: list[str]) -> list[list[str]]:
    calls = []
    for number, (stage, flags) in enumerate(EXPECTED[nodes].items()):
        log = "%x-%A_%a.log" if stage == "preprocess" else "%x-%j.log"
        array = [flag for flag in flags if flag.startswith("--array=")]
        waits = [f"--dependency=afterok:{100 + number}", "--kill-on-invalid-dep=yes"] if number else []
        calls.append(
            [
                "--parsable",
                f"--job-name=run-{stage}",
                f"--output={cluster.run_dir}/slurm/{log}",
                *array,
                *waits,
                *flags[len(array) :],
                *SCRIPTS[stage],
                *arguments,
            ]
        )
    return calls


@pytest.mark.parametrize("nodes", [1, 2, 64])
def test_the_whole_chain(cluster: Cluster, nodes: int) -> None:
    more = [*SETTINGS[nodes], "data.train.0.name=a b"]
    assert cluster.submit(*more) == 0, cluster.err
    arguments = [TINY, *cluster.overrides(*more)]
    assert cluster.calls() == expected_calls(cluster, nodes, arguments)
    rows = {line.split()[0]: line for line in cluster.out.splitlines() if line.strip()}
    assert rows["stage"].split() == ["stage", "job", "after", "script", "resources"]
    for number, stage in enumerate(EXPECTED[nodes]):
        assert rows[stage].split()[1:3] == [str(101 + number), str(100 + number) if number else "-"]
    assert f"tail -F {cluster.run_dir}/slurm/run-preprocess-101_*.log" in cluster.out
    record = [
        json.loads(line) for line in Path(f"{cluster.run_dir}/slurm/submitted.jsonl").read_text().splitlines()
    ]
    assert [(entry["stage"], entry["job_id"]) for entry in record] == [
        (stage, str(101 + number)) for number, stage in enumerate(EXPECTED[nodes])
    ]
    assert [entry["command"] for entry in record] == [["sbatch", *call] for call in cluster.calls()]


def test_dry_run_types_the_same_and_touches_nothing(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed, pasted into a shell, is what would have been submitted."""
    more = [*SETTINGS[64], "data.train.0.name=a b"]
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))
    before = sorted(ROOT.glob("*")), sorted(ROOT.glob("runs/*")), sorted(tmp_path.rglob("*"))
    assert cluster.submit(*more, flags=("--dry-run",)) == 0, cluster.err
    assert before == (sorted(ROOT.glob("*")), sorted(ROOT.glob("runs/*")), sorted(tmp_path.rglob("*")))
    _, _, rest = cluster.out.partition("# the commands, to be typed in ")
    folder, _, rest = rest.partition("\n")
    commands, _, scripts = rest.partition("\n# ----")
    assert folder == str(ROOT)
    for name in ("env.sh", "lib.sh", "preprocess_edit.sh", "pretrain_edited.sh", "evaluate.sh"):
        assert f"slurm/{name} ----" in scripts
        assert (ROOT / "slurm" / name).read_text().strip() in scripts
    monkeypatch.setenv("PATH", path)
    subprocess.run(["bash", "-euc", commands], check=True)
    assert cluster.calls() == expected_calls(cluster, 64, [TINY, *cluster.overrides(*more)])
    assert Path(cluster.run_dir, "slurm").is_dir()


# ----------------------------------------------------------------------------------------------- what is left


def test_only_tasks_that_owe_units_run_again(cluster: Cluster, make_units: Callable[..., None]) -> None:
    make_units("docs", [0, 1, 2, 4, 5, 6], 8)
    make_units("heldout", [0], 1, merged=True)
    more = (*UNITS, "slurm.preprocess={tasks: 8, max_running: 3}")
    assert cluster.submit(*more) == 0, cluster.err
    merge, train = "slurm/preprocess_edit.sh --merge", "slurm/pretrain_edited.sh"
    assert cluster.scripts() == ["slurm/preprocess_edit.sh", merge, train]
    assert "--array=3,7%3" in cluster.calls()[0]
    assert "dataset that is missing: docs: " in cluster.out
    assert "datasets that are there: heldout" in cluster.out
    assert "tasks 3,7%3 of 8, each 1 node" in cluster.out
    assert cluster.submit(*more[:-1], "slurm.preprocess={tasks: 16}", flags=("--dry-run",)) == 0
    assert "--array=3,7,11,15 " in cluster.out, "another number of tasks: those that owe units under it"
    make_units("docs", [3, 7], 8)
    assert cluster.submit(*more) == 0
    assert cluster.scripts()[3:] == [merge, train]
    assert "left out: preprocess: all work units are done" in cluster.out
    assert not any("--dependency" in word for word in cluster.calls()[3])


def test_what_is_done_is_left_out(cluster: Cluster, make_units: Callable[..., None]) -> None:
    for name in ("docs", "heldout"):
        make_units(name, [0], 1, merged=True)
    more = (*UNITS, "slurm.evaluate={}")
    assert cluster.submit(*more) == 0, cluster.err
    assert cluster.scripts() == ["slurm/pretrain_edited.sh", "slurm/evaluate.sh"]
    assert "left out: preprocess, merge: all datasets are there" in cluster.out
    checkpoint(cluster.run_dir, 20)
    assert cluster.submit(*more) == 0
    assert cluster.scripts()[2:] == ["slurm/pretrain_edited.sh", "slurm/evaluate.sh"]
    assert "run: step 20 of 40" in cluster.out
    checkpoint(cluster.run_dir, 40)
    assert cluster.submit(*more) == 0
    assert cluster.scripts()[4:] == ["slurm/evaluate.sh"]
    assert "left out: preprocess, merge, train: the run is complete: step 40 of 40" in cluster.out
    Path(cluster.run_dir, "evaluation").mkdir()
    Path(cluster.run_dir, "evaluation", "perplexity_step_40.json").write_text("{}")
    assert cluster.submit(*more) == 0
    assert "nothing to submit" in cluster.out
    assert len(cluster.calls()) == 5
    assert cluster.submit(*UNITS, flags=("--stages", "train,evaluate")) == 0
    assert cluster.scripts()[5:] == ["slurm/evaluate.sh"], "asked for by name: evaluate again"


def test_a_complete_run_needs_no_dataset(cluster: Cluster, make_units: Callable[..., None]) -> None:
    """Only an evaluation that is still to come needs the validation data."""
    checkpoint(cluster.run_dir, 40)
    assert cluster.submit() == 0, cluster.err
    assert "nothing to submit" in cluster.out
    make_units("heldout", [0], 1, merged=True)
    assert cluster.submit(*UNITS, "slurm.evaluate={}") == 0
    assert cluster.scripts() == ["slurm/evaluate.sh"]
    Path(f"{cluster.folder}/data/heldout_text_document.idx").unlink()
    assert cluster.submit(*UNITS, "slurm.evaluate={}") == 0
    assert cluster.scripts()[-1] == "slurm/evaluate.sh"
    assert "slurm/preprocess_edit.sh --merge" in cluster.scripts()


def test_stages_by_name(cluster: Cluster, make_units: Callable[..., None]) -> None:
    assert cluster.submit(flags=("--stages", "train,preprocess")) == 0, cluster.err
    assert cluster.scripts() == ["slurm/preprocess_edit.sh", "slurm/pretrain_edited.sh"]
    assert "--dependency=afterok:101" in cluster.calls()[1]
    assert cluster.submit(flags=("--stages", "merge")) == 1
    assert "merge: work units are not done yet; add preprocess to --stages" in cluster.err
    assert cluster.submit(flags=("--stages", "evaluate")) == 1
    assert "evaluate: " + cluster.run_dir + " has no checkpoint yet; add train to --stages" in cluster.err
    assert "evaluate: no dataset of heldout; add preprocess and merge to --stages" in cluster.err
    for usage in (["--stages", "trian"], ["--stages", ""]):
        with pytest.raises(SystemExit) as end:
            main(["--config", TINY, *usage])
        assert end.value.code == 2
    assert len(cluster.calls()) == 2


def test_a_continuation_has_its_own_script(cluster: Cluster) -> None:
    origin = f"{cluster.folder}/first"
    more = ("stage=continue", f"init_from.checkpoint={origin}")
    assert cluster.submit(*more) == 1
    assert f"init_from.checkpoint: {origin}: does not exist" in cluster.err
    checkpoint(origin, 7)
    assert cluster.submit(*more, flags=("--stages", "train")) == 0, cluster.err
    assert cluster.scripts() == ["slurm/continual_pretrain.sh"]


def test_fine_tuning_has_its_own_script(cluster: Cluster) -> None:
    origin = f"{cluster.folder}/first"
    checkpoint(origin, 7)
    more = ("stage=sft", f"init_from.checkpoint={origin}")
    assert cluster.submit(*more, flags=("--stages", "train")) == 0, cluster.err
    assert cluster.scripts() == ["slurm/sft.sh"]


@pytest.mark.parametrize(
    ("tasks", "max_running", "expected"),
    [
        ([0], None, "0"),
        ([0, 1, 2], 2, "0-2%2"),
        ([0, 2, 3, 5], None, "0,2-3,5"),
        ([3, 7], 8, "3,7%8"),
    ],
)
def test_array_expression(tasks: list[int], max_running: int | None, expected: str) -> None:
    assert array_expression(tasks, max_running) == expected


def test_the_notice_before_the_time_limit(cluster: Cluster) -> None:
    assert cluster.submit("slurm.train={signal: 900, time: 8-0}", "slurm.preprocess.signal=60") == 0
    signals = [[word for word in call if word.startswith("--signal")] for call in cluster.calls()]
    assert signals == [["--signal=B:USR1@60"], [], ["--signal=B:USR1@900"]]


def test_jobs_do_not_inherit_from_the_job_that_submits_them(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    inherited = {"SLURM_CPUS_PER_TASK": "16", "RANKS_PER_NODE": "8", "TOKEDIT_EXPECTED_NODES": "2"}
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    slurm = Slurm(ROOT / "slurm" / "env.sh")
    assert set(inherited) <= set(slurm.run(["env"]).stdout.replace("=", "\n").split())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    seen = slurm.run(["env"]).stdout.replace("=", "\n").split()
    assert not set(inherited) & set(seen)
    assert "SLURM_CONF" in seen
