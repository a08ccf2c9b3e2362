"""A job whose prior takes several processes: the bytes of one process, and clear words where it cannot be."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import orjson
import psutil
import pytest

sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in ("engine", "scoring")]

import replica_cases
import replica_jobs
from pipeline_cases import TOKENIZER, VOCAB_SIZE, editing, output_bytes, settings, write_corpus

from megatron_tokedit.cli.preprocess_edit import main
from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.config.raw_sources import preprocessing_of
from megatron_tokedit.config.sections import SourceConfig, TokenizerConfig
from megatron_tokedit.dataset import read_manifest
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.pipeline import replicas, run
from megatron_tokedit.pipeline.placement import Share
from megatron_tokedit.pipeline.prepared import place_output
from megatron_tokedit.pipeline.replicas import find_place
from megatron_tokedit.testing.models import tiny_llama, write_hf_llama

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


@pytest.fixture(scope="module")
def work(ranks, tmp_path_factory):
    """A corpus, a Hugging Face prior and a checkpoint with its weights, and what one process makes of it."""
    root = tmp_path_factory.mktemp("replicas")
    fields = {"num_hidden_layers": 4, "initializer_range": 0.2, "max_position_embeddings": 32}
    write_hf_llama(root / "hf", vocab_size=VOCAB_SIZE, **fields)
    model = tiny_llama(norm_epsilon=1e-6)
    ranks.run(replica_cases.save_checkpoint, root / "run", model, root / "hf", world_size=1)
    write_corpus(root / "corpus.jsonl")
    run(preprocess_config(settings(root, "hf", **editing(root / "hf"))))
    return root


def arguments(work, name, prior="run", *more):
    command = ["--input", str(work / "corpus.jsonl"), "--output-prefix", str(work / name)]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", TOKENIZER, "--append-eod"]
    command += ["--unit-documents", "3"]
    for flag, value in editing(work / prior).items():
        command += [f"--{flag.replace('_', '-')}", str(value)]
    return [*command, *more]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def edits(work, name):
    return output_bytes(work, name, suffixes=(".bin", ".idx", ".edits"))


@pytest.mark.parametrize(
    ("name", "flags", "world_size"),
    [
        ("one", ["--workers", "1"], 1),
        ("tp2", ["--prior-tensor-parallel", "2"], 2),
        ("pp2", ["--prior-pipeline-parallel", "2"], 2),
        ("two-replicas", ["--prior-tensor-parallel", "2"], 4),
        pytest.param(
            "tp2-pp2",
            ["--prior-tensor-parallel", "2", "--prior-pipeline-parallel", "2"],
            4,
            marks=pytest.mark.stress,
        ),
    ],
)
def test_the_edits_are_those_of_the_hugging_face_prior(ranks, work, name, flags, world_size):
    command = arguments(work, name, "run", *flags)
    results = ranks.run(replica_jobs.preprocess, command, free_port(), world_size=world_size)
    assert [code for code, _ in results] == [0] * world_size, results
    assert edits(work, name) == edits(work, "hf")
    size = 2 ** sum("parallel" in flag for flag in flags)
    for rank, (_, said) in enumerate(results):
        assert bool(re.search("edited|documents", said)) == (
            rank % size == 0
        )  # followers have nothing to say
    prior = read_manifest(f"{work}/{name}_text_document").prior
    assert prior["backend"] == "megatron"
    assert prior.get("tensor_parallel") == (2 if "--prior-tensor-parallel" in flags else None)
    assert "pipeline_parallel" not in prior


def test_what_belongs_to_the_plan(ranks, work):
    """Sums over tensor-parallel ranks round otherwise; stages and replicas change nothing."""
    command = arguments(work, "plan", "run", "--stage", "edit")
    tp2 = [*command, "--prior-tensor-parallel", "2"]
    assert [code for code, _ in ranks.run(replica_jobs.preprocess, tp2, free_port(), world_size=2)] == [0, 0]
    merge = [*command, "--stage", "merge", "--prior-tensor-parallel", "2"]
    (result,) = ranks.run(replica_jobs.preprocess, merge, free_port(), world_size=1)
    assert result[0] == 0, "a merge needs no replica"
    (result,) = ranks.run(replica_jobs.preprocess, command, free_port(), world_size=1)
    assert result[0] == 1
    assert "prior.tensor_parallel: recorded 2, now None" in result[1]
    placed = {
        changes.get("prior_tensor_parallel", 1): place_output(
            preprocess_config(settings(work, "x", **editing(work / "run"), **changes)), str(work / "prepared")
        )
        for changes in ({}, {"prior_pipeline_parallel": 2}, {"prior_tensor_parallel": 2})
    }
    assert len(set(placed.values())) == 2


def test_a_failure_of_the_leader_ends_all(ranks, work):
    (work / "bad.jsonl").write_text('{"text": "the river"}\nnot json\n')
    command = arguments(work, "bad", "run", "--prior-tensor-parallel", "2")
    command[command.index("--input") + 1] = str(work / "bad.jsonl")
    (leader, said), (follower, why) = ranks.run(replica_jobs.preprocess, command, free_port(), world_size=2)
    assert (leader, follower) == (1, 1)
    assert "bad.jsonl:2" in said
    assert "its leader failed" in why
    assert "bad.jsonl:2" in why


@pytest.mark.parametrize(
    ("prior", "flags", "words"),
    [
        ("hf", ["--prior-tensor-parallel", "2"], "convert_checkpoint.py --from hf --to megatron --input"),
        ("run", ["--prior-pipeline-parallel", "3"], "3 does not divide model.num_layers = 4"),
    ],
)
def test_what_a_prior_cannot_do_is_refused_in_all_processes(ranks, work, prior, flags, words):
    command = arguments(work, "refused", prior, *flags)
    results = ranks.run(replica_jobs.preprocess, command, free_port(), world_size=int(flags[1]))
    assert all(code == 1 and words in said for code, said in results), results


def test_without_torchrun_the_command_is_named(work, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    command = arguments(
        work, "alone", "run", "--prior-tensor-parallel", "2", "--prior-pipeline-parallel", "2"
    )
    assert main(command) == 1
    said = capsys.readouterr().err
    assert (
        "prior_tensor_parallel=2 x prior_pipeline_parallel=2: a copy of the prior takes 4 processes" in said
    )
    assert "torchrun --nproc-per-node 4 tools/preprocess_edit.py --input" in said
    assert said.strip().endswith("--prior-tensor-parallel 2 --prior-pipeline-parallel 2")
    assert not (work / "alone.work").exists()


def test_a_dry_run_needs_no_replica(work, capsys):
    assert main([*arguments(work, "dry", "run", "--prior-tensor-parallel", "2"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 a copy of the prior (tensor 2 x pipeline 1)" in said
    assert "not measured: a prior that 2 processes hold together" in said


def test_places(work):
    config = preprocess_config(
        settings(work, "x", **editing(work / "run"), prior_tensor_parallel=2, prior_pipeline_parallel=2)
    )
    places = [find_place(config, {**TORCHRUN, "RANK": str(r), "WORLD_SIZE": "8"}) for r in range(8)]
    assert [(place.index, place.rank) for place in places] == [(r // 4, r % 4) for r in range(8)]
    assert [place.of_units for place in places[::4]] == [(0, 2), (1, 2)]
    third = Share(2, 5)  # as --rank 2 --world-size 5: of five torchruns of 8 processes each
    shared = [find_place(config, {**TORCHRUN, "RANK": r, "WORLD_SIZE": "8"}, third) for r in "04"]
    assert [place.of_units for place in shared] == [(2, 10), (7, 10)]
    with pytest.raises(ConfigError, match="takes 4 processes, and 6 were started; start a multiple of 4"):
        find_place(config, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "6"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": 2}, "workers=2: 2 processes work on one unit together"),
        ({"prior_backend": "hf"}, "are for Megatron checkpoints, and prior_backend is hf"),
        ({"prior_tensor_parallel": 0}, "prior_tensor_parallel=0: expected"),
    ],
)
def test_settings_that_contradict_replicas_are_refused(work, changes, words):
    asked = {**editing(work / "run"), "prior_tensor_parallel": 2, **changes}
    with pytest.raises(ConfigError, match=re.escape(words).replace("expected", ".*greater than")):
        preprocess_config(settings(work, "x", **asked))


def test_torchrun_starts_a_replica(work):
    command = [*arguments(work, "torchrun", "run"), "--prior-tensor-parallel", "2", "--quiet"]
    found = torchrun(2, command)
    assert found.returncode == 0, found.stderr[-3000:]
    assert edits(work, "torchrun") == edits(work, "hf")
    statistics = orjson.loads((work / "torchrun_text_document.stats.json").read_bytes())
    assert statistics["edit"]["changed"] > 100


@pytest.mark.stress
def test_a_killed_follower_ends_the_job_and_it_goes_on(work):
    """Its leader says so, torchrun ends, and the same command finishes what is left."""
    write_corpus(work / "corpus.jsonl", 400)
    run(preprocess_config(settings(work, "kill-hf", **editing(work / "hf"))))
    command = [*arguments(work, "kill", "run"), "--prior-tensor-parallel", "2"]
    with start_torchrun(2, command, stderr=subprocess.PIPE, text=True) as job:
        while not list((work / "kill.work").glob("units/*/*.json")):
            time.sleep(0.1)
        for child in psutil.Process(job.pid).children(recursive=True):
            if child.environ().get("RANK") == "1":
                child.kill()
        _, said = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "ended without a word" in said or "Signal 9 (SIGKILL)" in said
    done = len(list((work / "kill.work").glob("units/*/*.json")))
    assert 0 < done < 134
    assert torchrun(2, command).returncode == 0
    assert edits(work, "kill") == edits(work, "kill-hf")


def start_torchrun(num_processes, command, **settings):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}",
         str(ROOT / "tools" / "preprocess_edit.py"), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, **settings,
    )  # fmt: skip


def torchrun(num_processes, command):
    with start_torchrun(num_processes, command, stderr=subprocess.PIPE, text=True) as job:
        _, said = job.communicate(timeout=240)
    return subprocess.CompletedProcess(command, job.returncode, stderr=said)


def test_a_gpu_is_not_shared(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    replicas._refuse_shared_gpus({"LOCAL_WORLD_SIZE": "4"})
    with pytest.raises(ConfigError, match=r"8 processes on this node, and 4 GPU\(s\) for them"):
        replicas._refuse_shared_gpus({"LOCAL_WORLD_SIZE": "8"})


def test_a_training_source_is_not_edited_by_a_replica(work):
    """A training run prepares its sources with priors of one process."""
    source = SourceConfig(
        name="a",
        input=[str(work / "corpus.jsonl")],
        edit={"prior": str(work / "run"), "prior_tensor_parallel": 2},
        weight=1.0,
    )
    job = preprocessing_of(source, TokenizerConfig(type="SentencePieceTokenizer", model=TOKENIZER))
    config = job.model_copy(update={"output_prefix": str(work / "source"), "prior_device": "cpu"})
    with pytest.raises(ConfigError, match=r"torchrun --nproc-per-node 2 tools/preprocess_edit.py"):
        run(config, isolate=True)
