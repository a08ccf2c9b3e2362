"""Who may share a job and its machine: cores, several processes at once, moved files, changed inputs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import orjson
import pytest
from pipeline_cases import VOCAB_SIZE, editing, output_bytes, settings, write_corpus
from test_kill import NONE, markers, start

from megatron_tokedit.cli.preprocess_edit import main
from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.dataset import read_manifest
from megatron_tokedit.errors import ConfigError, DataFormatError, PlanError
from megatron_tokedit.pipeline import run
from megatron_tokedit.pipeline.placement import WHOLE, usable_bytes, usable_cores
from megatron_tokedit.pipeline.resources import find_prior, load_tokenizers
from megatron_tokedit.pipeline.results import UnitResult
from megatron_tokedit.pipeline.workdir import WorkDir
from megatron_tokedit.pipeline.workers import count_workers
from megatron_tokedit.testing.models import write_hf_llama
from megatron_tokedit.tokenizers import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    return tmp_path


def job(folder, name, changes=None, **run_options):
    return run(preprocess_config(settings(folder, name, **(changes or {}))), **run_options)


@pytest.fixture
def six_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("six_cores")
def test_workers_keep_the_usable_cores_busy_by_default(folder, monkeypatch):
    config = preprocess_config(
        settings(folder, "out", **editing(write_hf_llama(folder / "p", vocab_size=VOCAB_SIZE), workers=None))
    )
    prior = find_prior(config, load_tokenizer(config.tokenizer_type, config.tokenizer_model))
    assert config.workers is None
    assert count_workers(config, None, 100) == 6
    assert count_workers(config, None, 4) == 4  # no more than units
    assert count_workers(config, prior, 100) == 6
    assert count_workers(config, replace(prior, threads=4), 100) == 1
    assert count_workers(config, replace(prior, threads=16), 100) == 1
    assert count_workers(config, replace(prior, device="cuda"), 100) == 1
    asked = config.model_copy(update={"workers": 9})
    assert count_workers(asked, replace(prior, device="cuda"), 100) == 9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # the ranks of a node share its cores
    assert count_workers(config, prior, 100) == 2


@pytest.mark.usefixtures("six_cores")
def test_workers_are_no_more_than_the_memory_holds(folder, monkeypatch, caplog):
    config = preprocess_config(
        settings(folder, "out", **editing(write_hf_llama(folder / "p", vocab_size=VOCAB_SIZE), workers=None))
    )
    prior = find_prior(config, load_tokenizer(config.tokenizer_type, config.tokenizer_model))
    for copies, expected in ((2.6, 2), (0.3, 1), (100.0, 6)):
        free = int(copies * prior.memory_bytes)
        monkeypatch.setattr("megatron_tokedit.pipeline.workers.usable_bytes", lambda free=free: free)
        assert count_workers(config, prior, 100) == expected
    assert 0 < usable_bytes() < 1 << 50


def test_a_control_groups_limits_count(monkeypatch):
    files = {"cpu.max": "150000 100000", "memory.max": "1000000", "memory.current": "400000"}
    module = sys.modules[usable_cores.__module__]
    monkeypatch.setattr(module, "_control_group_number", lambda name: tuple(map(int, files[name].split())))
    assert usable_cores({}) == 1
    assert usable_bytes() == 600000


def test_unchanged_weights_are_hashed_once(folder, monkeypatch):
    from megatron_tokedit.scoring import identity

    prior = write_hf_llama(folder / "p", vocab_size=VOCAB_SIZE)
    assert job(folder, "out", editing(prior), stage="edit", rank=0, world_size=2).outcome == "edited"
    hashed = []
    hash_files = identity.hash_files
    monkeypatch.setattr(identity, "hash_files", lambda paths: hashed.append(paths) or hash_files(paths))
    assert job(folder, "out", editing(prior)).outcome == "merged"
    assert not hashed
    weights = next(prior.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(PlanError, match=r"prior\.fingerprint"):
        job(folder, "out", editing(prior))
    assert hashed


@pytest.mark.usefixtures("six_cores")
def test_cores_are_divided_among_the_ranks_of_a_node():
    assert [usable_cores({"LOCAL_WORLD_SIZE": size}) for size in ("1", "2", "4", "8")] == [6, 3, 1, 1]
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE"):
        usable_cores({"LOCAL_WORLD_SIZE": "many"})


@pytest.mark.usefixtures("six_cores")
def test_a_job_uses_its_cores_where_slurm_binds_nothing():
    step = {"SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "4"}
    assert usable_cores(step) == 4
    assert usable_cores(step | {"LOCAL_WORLD_SIZE": "2"}) == 2
    assert usable_cores(step | {"SLURM_CPUS_ON_NODE": "96"}) == 6
    assert usable_cores({"SLURM_CPUS_ON_NODE": "4"}) == 6, "a shell of salloc is on another machine"


@pytest.mark.usefixtures("six_cores")
def test_sources_of_a_training_run_share_the_cores_of_the_node(folder, monkeypatch):
    from megatron_tokedit.cli import train_sources
    from megatron_tokedit.pipeline import workers

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    counted = []
    monkeypatch.setattr(
        "megatron_tokedit.pipeline.job.count_workers",
        lambda *arguments: counted.append(workers.count_workers(*arguments)) or 1,
    )
    ranks = train_sources.Ranks("test")
    config = preprocess_config(settings(folder, "out", workers=None))
    with train_sources._as_single_process():
        train_sources._edit(config, ranks, WHOLE)
    assert counted == [3]


def test_the_number_of_workers_is_told(folder, monkeypatch):
    lines = []
    monkeypatch.setattr("megatron_tokedit.pipeline.job.logger.info", lambda text, *a: lines.append(text % a))
    job(folder, "out", {"unit_documents": 1000})
    assert lines[0].startswith("work units to do: 1, done before: 0; workers: 1; text encoded by ")


def test_two_processes_at_once_share_the_work_and_one_merges(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", num_documents=200)
    pair = [start(tmp_path, "out", *NONE) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors
    assert sum("200 documents in" in text for text in errors) == 1
    job(tmp_path, "whole")
    assert output_bytes(tmp_path, "out") == output_bytes(tmp_path, "whole")


def test_units_scored_on_another_kind_of_device_are_not_mixed_in(folder, monkeypatch):
    from megatron_tokedit.scoring import load

    changes = editing(write_hf_llama(folder / "prior", vocab_size=VOCAB_SIZE))
    job(folder, "out", changes, stage="edit", rank=0, world_size=2)
    marker = markers(folder, "out")[0]
    result = UnitResult.load(marker)
    assert result.device == "cpu"
    monkeypatch.setattr(load, "resolve_device", lambda device: SimpleNamespace(type="cuda"))
    with pytest.raises(PlanError, match=r"the prior ran on cpu and on cuda.*--prior-device"):
        job(folder, "out", changes)
    monkeypatch.undo()
    replace(result, device="cuda").save(marker)
    job(folder, "out", changes, stage="edit", rank=1, world_size=2)
    with pytest.raises(PlanError, match=r"the prior ran on cpu and on cuda"):
        job(folder, "out", changes, stage="merge")
    result.save(marker)
    merging = changes | {"prior_device": "cuda"}  # as an array job says; the merge needs no such device
    assert job(folder, "out", merging, stage="merge").outcome == "merged"
    assert read_manifest(f"{folder}/out_text_document").prior["device"] == "cpu"


def test_the_merge_waits_for_those_who_write_units(folder):
    job(folder, "out", stage="edit")
    with WorkDir(str(folder / "out")).lock("units", shared=True):
        merging = threading.Thread(target=lambda: job(folder, "out"))
        merging.start()
        time.sleep(0.5)
        assert not (folder / "out_text_document.idx").exists()
    merging.join(60)
    assert (folder / "out_text_document.idx").exists()


def test_units_done_by_others_meanwhile_are_left_alone(folder):
    job(folder, "out", stage="edit")
    before = {path: path.stat().st_mtime_ns for path in markers(folder, "out")}
    from megatron_tokedit.pipeline.plan import load_plan
    from megatron_tokedit.pipeline.unit import UnitWorker

    config = preprocess_config(settings(folder, "out"))
    worker = UnitWorker(config, load_tokenizers(config), None)
    told = []
    for unit in load_plan(folder / "out.work" / "plan.json").units:
        worker.process(unit, lambda documents, tokens: told.append(documents))
    assert {path: path.stat().st_mtime_ns for path in markers(folder, "out")} == before
    assert sum(told) == 40


def test_a_finished_or_half_finished_job_may_be_moved(folder):
    job(folder, "whole")
    job(folder, "half", stage="edit", rank=0, world_size=2)
    moved = folder / "moved"
    moved.mkdir()
    for path in [*folder.glob("whole*"), *folder.glob("half*"), folder / "corpus.jsonl"]:
        path.rename(moved / path.name)
    assert job(moved, "whole").outcome == "already complete"
    before = {path: path.stat().st_mtime_ns for path in markers(moved, "half")}
    assert len(before) == 7
    assert job(moved, "half").outcome == "merged"
    assert output_bytes(moved, "half") == output_bytes(moved, "whole")
    manifest = orjson.loads((moved / "half_text_document.manifest.json").read_bytes())
    assert manifest["inputs"][0]["path"] == str(moved / "corpus.jsonl")


class Meddler:
    """A progress that writes to the input once work has begun."""

    def __init__(self, path):
        self.path = path

    def start(self, total_documents, done_documents):
        self.path.write_bytes(self.path.read_bytes().replace(b"river", b"RIVER"))

    def advance(self, documents, tokens):
        pass

    def close(self):
        pass


def test_an_input_that_changes_while_it_is_read_is_refused(folder):
    corpus = folder / "corpus.jsonl"
    with pytest.raises(DataFormatError, match=r"corpus\.jsonl: was changed while it was being read"):
        job(folder, "out", progress=Meddler(corpus))
    assert not (folder / "out_text_document.idx").exists()
    with pytest.raises(PlanError, match="content has changed"):
        job(folder, "out")
    assert job(folder, "out", restart=True).outcome == "merged"


def test_a_restart_that_cannot_begin_discards_nothing(folder):
    job(folder, "out", stage="edit")
    before = markers(folder, "out")
    with pytest.raises(DataFormatError, match="does not exist"):
        job(folder, "out", {"input": [str(folder / "typo.jsonl")]}, restart=True)
    assert markers(folder, "out") == before
    assert job(folder, "out").outcome == "merged"


def test_what_a_killed_merge_leaves_is_removed(folder):
    job(folder, "out", stage="edit")
    precious = folder / "out_text_document.bin.tmp"
    left = [folder / "out_text_document.bin.0123456789ab.tmp", folder / "out.work/complete.json.0.tmp"]
    for path in (precious, *left):
        path.write_bytes(b"half")
    job(folder, "out")
    assert precious.exists()
    assert not any(path.exists() for path in left)


def test_ctrl_c_is_one_message_whatever_the_workers_are_doing(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", num_documents=2000)
    for wait_seconds in (0.0, 0.05, 0.2, 0.6):
        process = start(tmp_path, f"out{wait_seconds}", *NONE, "--workers", "2")
        seen = b""
        while b"workers: 2" not in seen:
            seen += os.read(process.stderr.fileno(), 4096)
        time.sleep(wait_seconds)
        os.killpg(process.pid, signal.SIGINT)
        errors = (seen + process.communicate(timeout=60)[1]).decode()
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert errors.count("error: interrupted") == 1


def test_a_warning_is_given_once(tmp_path, capfd):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    write_corpus(tmp_path / "corpus.jsonl", num_documents=4)
    arguments = ["--input", str(tmp_path / "corpus.jsonl"), "--append-eod", *NONE]
    arguments += ["--tokenizer-type", "HuggingFaceTokenizer"]
    arguments += ["--tokenizer-model", str(tmp_path / "tokenizer")]
    for workers in ("1", "2"):
        code = main([*arguments, "--output-prefix", str(tmp_path / f"out{workers}"), "--workers", workers])
        errors = capfd.readouterr().err  # of the workers, too
        assert code == 0, errors
        assert errors.count("names no eos_token") == 1
