"""``tools/submit.py`` refuses: faults, jobs that are queued already, and what Slurm itself does not take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from submit_cases import ROOT, UNITS, Cluster, cluster_fixture, make_units_fixture

__all__ = ["cluster_fixture", "make_units_fixture"]


def test_every_problem_in_one_message(cluster: Cluster) -> None:
    wrong = [
        "tokenizer.model=no/such.model",
        "data.train.0.input=[no/such.jsonl]",
        "data.train.0.edit={edit_strategy: up_revise, prior: no/prior}",
        "data.validation.0.input=null",
        "data.validation.0.edit=null",
        "run_dir=LICENSE/run",
        "slurm.train={nodes: 3, gpus_per_node: 1, time: 4:00}",
        "slurm.merge.mem=lots",
        "optimizer.lr=fast",
    ]
    assert cluster.submit(*wrong) == 1
    assert "8 problems" in cluster.err
    for expected in (
        "optimizer.lr: got 'fast'",
        "slurm.train.time: got 240",
        "slurm.merge.mem: got 'lots'",
        "tokenizer.model: cannot read the sentencepiece model no/such.model",
        "data.train.0.input: cannot use the input:\n  no/such.jsonl: does not exist",
        "data.train.0.edit.prior: no/prior does not exist",
        f"data.validation.0.prefix: {cluster.folder}/data/heldout_text_document.bin and .idx are not there",
        f"run_dir: {ROOT}/LICENSE is not a folder",
    ):
        assert expected in cluster.err
    assert cluster.submit("slurm.train={nodes: 3, gpus_per_node: 1}", "model.vocab_size=100") == 1
    assert "2 problems" in cluster.err
    assert "8 is not a multiple of micro_batch_size x data-parallel size = 2 x 3" in cluster.err
    assert "model.vocab_size: 100 ids cannot hold the tokenizer's 1024" in cluster.err
    assert cluster.submit("data.validation=[]", flags=("--stages", "evaluate")) == 1
    assert "data.validation: there is nothing to evaluate on" in cluster.err
    assert not cluster.calls()
    assert not cluster.folder.exists()


def test_a_dataset_made_otherwise_is_refused(cluster: Cluster, make_units: Callable[..., None]) -> None:
    make_units("docs", [0], 1, merged=True)
    assert cluster.submit(*UNITS, "data.train.0.edit.append_eod=false") == 1
    assert "append_eod: recorded True, now False" in cluster.err


def test_active_jobs_are_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Path(f"{cluster.log}.asked")
    assert cluster.submit() == 0, cluster.err
    assert not asked.exists(), "nothing was submitted before: nobody to ask for"
    monkeypatch.setenv(
        "FAKE_QUEUE",
        "103 run-train 103 PENDING\n101 run-preprocess 101_[2-3%2] PENDING\n"
        "101 run-preprocess 101_1 RUNNING\n102 of_another 102 RUNNING\n999 run-train 999 RUNNING",
    )
    assert cluster.submit() == 1
    assert asked.read_text() == "squeue --noheader --format=%F %j %i %T --jobs=101,102,103\n"
    assert (
        "in the queue: run-preprocess: 101_[2-3%2] PENDING, 101_1 RUNNING; run-train: 103 PENDING. Wait"
        in cluster.err
    )
    assert "(scancel 101 103), or give --force" in cluster.err
    assert len(cluster.calls()) == 3
    assert cluster.submit(flags=("--force",)) == 0
    assert len(cluster.calls()) == 6
    monkeypatch.setenv("FAKE_SQUEUE_ERROR", "slurm_load_jobs error: Unable to contact slurm controller")
    assert cluster.submit() == 1
    assert "squeue does not say whether jobs of this run are queued: slurm_load_jobs error" in cluster.err
    monkeypatch.setenv("FAKE_SQUEUE_ERROR", "slurm_load_jobs error: Invalid job id specified")
    assert cluster.submit() == 0, "squeue has forgotten them: they are over"


def test_a_refused_job_takes_the_chain_with_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_REFUSES", "pretrain_edited.sh")
    monkeypatch.setenv("FAKE_REASON", "Invalid partition name specified")
    assert cluster.submit("slurm.train.partition=gpus") == 1
    assert (
        "sbatch refuses the train job: sbatch: error: Batch job submission failed: Invalid partit"
        in cluster.err
    )
    assert "the command was: sbatch --parsable --job-name=run-train" in cluster.err
    assert "cancelled, so that nothing of this chain runs: 101, 102" in cluster.err
    assert Path(f"{cluster.log}.asked").read_text() == "scancel 101 102\n"
    monkeypatch.setenv("FAKE_QUEUE", "101 run-preprocess 101_0 RUNNING")
    monkeypatch.setenv("FAKE_SCANCEL_ERROR", "scancel: error: no contact")
    assert cluster.submit("slurm.train.partition=gpus") == 1
    assert (
        "submitted before it and NOT cancelled (scancel: error: no contact): scancel 103 104" in cluster.err
    )
    monkeypatch.delenv("FAKE_REFUSES")
    monkeypatch.setenv("FAKE_QUEUE", "103 run-preprocess 103_0 RUNNING")
    assert cluster.submit() == 1
    assert "jobs of this run are in the queue: run-preprocess: 103_0 RUNNING" in cluster.err


def test_arrays_have_a_limit(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.submit("slurm.preprocess.tasks=1002") == 1
    assert "slurm.preprocess.tasks: 1002 tasks, and this cluster's arrays have at most 1001" in cluster.err
    assert "MaxArraySize" in cluster.err
    assert not cluster.calls()
    assert cluster.submit("slurm.preprocess.tasks=1001") == 0
    assert "--array=0-1000" in cluster.calls()[0]
    monkeypatch.setenv("FAKE_REFUSES", "--array=0-9")
    monkeypatch.setenv("FAKE_REASON", "Invalid job array specification")
    assert cluster.submit("slurm.preprocess.tasks=10", flags=("--force",)) == 1
    assert "the size of the array is slurm.preprocess.tasks" in cluster.err


def test_no_slurm(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(bare))
    assert cluster.submit() == 1
    assert "sbatch, squeue, scancel, scontrol: not on this machine" in cluster.err
    assert not cluster.folder.exists()


def test_the_sites_variables_hold(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """env.sh is sourced before sbatch runs; what it prints is not taken for a job's id."""
    site = tmp_path / "site"
    (site / "slurm").mkdir(parents=True)
    monkeypatch.setenv("TOKEDIT_ROOT", str(site))
    assert cluster.submit() == 1
    assert "has no slurm/env.sh" in cluster.err
    (site / "slurm" / "env.sh").write_text("echo 777; export SBATCH_PARTITION=from_site\n")
    assert cluster.submit() == 1
    assert "has no preprocess_edit.sh, pretrain_edited.sh" in cluster.err
    for name in ("preprocess_edit.sh", "pretrain_edited.sh"):
        (site / "slurm" / name).touch()
    assert cluster.submit() == 0, cluster.err
    partitions = [json.loads(line)[0] for line in cluster.log.read_text().splitlines()]
    assert partitions == ["from_site"] * 3
    assert cluster.scripts()[2] == f"{site}/slurm/pretrain_edited.sh"
    assert "--dependency=afterok:101" in cluster.calls()[1]
