"""The preprocessing job in one process: bytes, accounting, restarts, refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import orjson
import psutil
import pytest
from pipeline_cases import DATA, TOKENIZER, VOCAB_SIZE, editing, output_bytes, settings, write_corpus

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.dataset import IndexedDataset, read_manifest, undo_dataset, verify_dataset
from megatron_tokedit.errors import ConfigError, DataFormatError, PlanError, TokenizerError
from megatron_tokedit.pipeline import inspect_job, placement, run
from megatron_tokedit.testing.models import write_hf_llama

ALL = (".bin", ".idx", ".edits")


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return write_hf_llama(tmp_path_factory.mktemp("prior") / "llama", vocab_size=VOCAB_SIZE)


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    return tmp_path


def job(folder, name, changes=None, **run_options):
    return run(preprocess_config(settings(folder, name, **(changes or {}))), **run_options)


def stats(folder, name, key="text"):
    return orjson.loads((folder / f"{name}_{key}_document.stats.json").read_bytes())


@pytest.mark.parametrize("unit", [{"unit_documents": 1}, {"unit_documents": 1000}, {"unit_bytes": 700}])
def test_our_golden_files_byte_for_byte(tmp_path, unit):
    shutil.copy(DATA / "golden_corpus.jsonl", tmp_path / "corpus.jsonl")
    job(tmp_path, "out", {"unit_documents": None} | unit)
    golden = [
        (DATA / f"golden_sentencepiece_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")
    ]
    assert output_bytes(tmp_path, "out") == golden


def test_edit_is_the_same_for_any_unit_size_and_can_be_undone(folder, prior):
    for name, unit in (("a", 3), ("b", 1000), ("c", 1)):
        job(folder, name, editing(prior) | {"unit_documents": unit})
    assert output_bytes(folder, "a", suffixes=ALL) == output_bytes(folder, "b", suffixes=ALL)
    assert output_bytes(folder, "a", suffixes=ALL) == output_bytes(folder, "c", suffixes=ALL)
    job(folder, "plain")
    assert output_bytes(folder, "a")[0] != output_bytes(folder, "plain")[0]
    undo_dataset(f"{folder}/a_text_document", f"{folder}/undone_text_document")
    assert output_bytes(folder, "undone") == output_bytes(folder, "plain")
    verify_dataset(f"{folder}/a_text_document", vocab_size=VOCAB_SIZE)
    edit = stats(folder, "a")["edit"]
    assert 0 < edit["changed"] <= edit["resampled"] == edit["eligible"] < edit["scored"] == edit["tokens"]
    assert sum(edit["p_histogram_10"]) == edit["scored"]
    manifest = read_manifest(f"{folder}/a_text_document")
    assert manifest.edit["rules"] == [{"action": "resample", "at_least": 0.003}]
    assert manifest.prior["context_tokens"] == 24
    assert manifest.counts["num_changed_tokens"] == edit["changed"]


def test_dropping_presets_are_undone_too(folder, prior):
    changes = editing(prior, edit_strategy="low_drop_up_revise", edit_low_threshold=0.0028)
    job(folder, "drop", changes)
    job(folder, "plain")
    edit = stats(folder, "drop")["edit"]
    assert edit["dropped"] > 0
    assert edit["changed"] > 0
    plain, edited = (IndexedDataset(f"{folder}/{name}_text_document") for name in ("plain", "drop"))
    assert edited.num_tokens == plain.num_tokens - edit["dropped"]
    assert edited.num_sequences == plain.num_sequences
    undo_dataset(f"{folder}/drop_text_document", f"{folder}/undone_text_document")
    assert output_bytes(folder, "undone") == output_bytes(folder, "plain")


def test_the_seed_and_only_the_seed_changes_the_draws(folder, prior):
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        job(folder, name, editing(prior, seed=seed))
    assert output_bytes(folder, "a") == output_bytes(folder, "c") != output_bytes(folder, "b")


def test_first_and_special_tokens_stay(folder, prior):
    job(folder, "a", editing(prior, edit_threshold=0.0, edit_temperature=50.0))
    job(folder, "plain")
    edited, plain = (IndexedDataset(f"{folder}/{name}_text_document") for name in ("a", "plain"))
    differing = 0
    for index in range(plain.num_documents):
        ours = np.concatenate([*edited.document(index), [0]])
        original = np.concatenate([*plain.document(index), [0]])
        assert len(ours) == len(original)
        assert ours[0] == original[0]
        special = np.isin(original, [0, 1, 2, 3])
        assert (ours[special] == original[special]).all()
        assert not np.isin(ours[~special], [0, 1, 2, 3]).any()
        differing += int((ours != original).sum())
    assert differing > 100


def test_several_keys_in_one_pass(folder, prior):
    job(folder, "two", editing(prior, json_keys=["text", "title"]))
    job(folder, "one", editing(prior))
    assert output_bytes(folder, "two", suffixes=ALL) == output_bytes(folder, "one", suffixes=ALL)
    assert IndexedDataset(f"{folder}/two_title_document").num_documents == 40


@pytest.mark.usefixtures("forked_workers")
def test_workers_give_the_same_bytes(folder, prior):
    job(folder, "one", editing(prior, workers=1))
    job(folder, "two", editing(prior, workers=2))
    suffixes = (*ALL, ".manifest.json")
    assert output_bytes(folder, "one", suffixes=suffixes) == output_bytes(folder, "two", suffixes=suffixes)


class Killer:
    """A progress that kills workers once a few documents are done: all, or one that has a unit open."""

    def __init__(self, *, one_at_work=False):
        self.one_at_work = one_at_work
        self.before = set(psutil.Process().children())
        self.done = 0
        self.has_killed = False

    def start(self, total_documents, done_documents):
        pass

    def advance(self, documents, tokens):
        self.done += documents
        if self.done < 5 or self.has_killed:
            return
        children = set(psutil.Process().children()) - self.before
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        for worker in workers:
            worker.suspend()  # so that the unit it has open stays open until it is killed
        victims = [worker for worker in workers if has_unit_open(worker)][:1] if self.one_at_work else workers
        for victim in victims:
            victim.kill()
        for worker in workers:
            if worker not in victims:
                worker.resume()
        self.has_killed = bool(victims)

    def close(self):
        pass


def has_unit_open(process):
    return any("/units/" in file.path for file in process.open_files())


def test_dead_workers_are_reported_with_their_units(folder):
    changes = {"workers": 2, "unit_documents": 1}
    with pytest.raises(PlanError, match=r"killed by signal 9 in work unit \d+ \(.*corpus"):
        job(folder, "out", changes, progress=Killer())
    # of the five units that were reported each of the two workers may have had one still to finish
    assert 3 <= len(list((folder / "out.work").glob("units/*/*.json"))) < 12
    assert not (folder / "out_text_document.idx").exists()
    job(folder, "out", changes)
    job(folder, "whole")
    assert output_bytes(folder, "out") == output_bytes(folder, "whole")


def test_one_dead_worker_lets_the_others_go_on(folder):
    changes = {"workers": 2, "unit_documents": 1}
    with pytest.raises(PlanError) as refusal:
        job(folder, "out", changes, progress=Killer(one_at_work=True))
    assert str(refusal.value).startswith("1 work unit is not done")
    assert "\n  a worker was killed by signal 9 in work unit" in str(refusal.value)
    assert len(list((folder / "out.work").glob("units/*/*.json"))) == 39
    assert job(folder, "out", changes).outcome == "merged"
    job(folder, "whole")
    assert output_bytes(folder, "out") == output_bytes(folder, "whole")


def test_rerun_of_a_finished_job_does_nothing(folder):
    assert job(folder, "out").outcome == "merged"
    before = (folder / "out_text_document.bin").stat().st_mtime_ns
    assert job(folder, "out").outcome == "already complete"
    assert (folder / "out_text_document.bin").stat().st_mtime_ns == before
    assert sorted(path.name for path in (folder / "out.work").iterdir()) == [
        "complete.json",
        "plan.json",
        "plan.lock",
        "units.lock",
    ]
    (folder / "out_text_document.bin").unlink()  # a lost output is made again
    assert job(folder, "out").outcome == "merged"


def test_a_changed_plan_is_refused_with_its_differences(folder, prior):
    job(folder, "out", editing(prior), stage="edit")
    with pytest.raises(PlanError, match=r"edit\.rules: recorded .*0\.003.*, now .*0\.5") as refusal:
        job(folder, "out", editing(prior, edit_threshold=0.5, append_eod=False))
    assert "append_eod: recorded True, now False" in str(refusal.value)
    assert "--restart" in str(refusal.value)
    write_corpus(folder / "corpus.jsonl", seed=1)
    with pytest.raises(PlanError, match="content has changed"):
        job(folder, "out", editing(prior))
    assert job(folder, "out", editing(prior), restart=True).outcome == "merged"


def test_a_foreign_dataset_is_not_overwritten(folder):
    (folder / "out_text_document.bin").write_bytes(b"precious")
    with pytest.raises(PlanError, match="exists already"):
        job(folder, "out")
    assert (folder / "out_text_document.bin").read_bytes() == b"precious"
    assert job(folder, "out", restart=True).outcome == "merged"


def test_ranks_share_a_job_and_the_last_one_merges(folder):
    outcomes = [job(folder, "out", rank=rank, world_size=3).outcome for rank in (2, 0, 1)]
    assert outcomes == ["edited", "edited", "merged"]
    job(folder, "whole")
    assert output_bytes(folder, "out") == output_bytes(folder, "whole")


def test_stages(folder):
    with pytest.raises(PlanError, match="cannot merge: 14 of 14 work units"):
        job(folder, "out", stage="merge")
    assert job(folder, "out", stage="edit", rank=0, world_size=2).outcome == "edited"
    with pytest.raises(PlanError, match="cannot merge: 7 of 14"):
        job(folder, "out", stage="merge")
    assert job(folder, "out", stage="edit", rank=1, world_size=2).outcome == "edited"
    assert job(folder, "out", stage="merge").outcome == "merged"
    with pytest.raises(ConfigError, match="--restart"):
        job(folder, "out", restart=True, world_size=2)


def test_bad_lines_are_counted_over_all_units(folder):
    with (folder / "corpus.jsonl").open("ab") as file:
        file.write(b'{"text": \n{"other": "x"}\n{"text": 3}\n')
    with pytest.raises(DataFormatError, match=r"corpus\.jsonl:41"):
        job(folder, "out")
    with pytest.raises(DataFormatError, match="3 bad lines so far, allowed are 2"):
        job(folder, "more", {"max_bad_lines": 2, "unit_documents": 1})
    job(folder, "ok", {"max_bad_lines": 3})
    documents = stats(folder, "ok")["documents"]
    assert documents == {"in": 43, "out": 40, "dropped": {"bad_line": 3}, "unedited": {}}
    spent = stats(folder, "ok")["bytes"]
    assert spent["dropped"] == {"bad_line": len(b'{"text": \n{"other": "x"}\n{"text": 3}\n')}
    assert spent["in"] == spent["out"] + spent["dropped"]["bad_line"]
    job(folder, "part", {"max_bad_lines": 2, "unit_documents": 1}, stage="edit", rank=0, world_size=2)
    job(folder, "part", {"max_bad_lines": 2, "unit_documents": 1}, stage="edit", rank=1, world_size=2)
    with pytest.raises(DataFormatError, match="3 bad lines"):
        job(folder, "part", {"max_bad_lines": 2, "unit_documents": 1}, stage="merge")
    assert not (folder / "part_text_document.idx").exists()


def test_no_document_at_all_is_a_failure(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("{\n{\n")
    with pytest.raises(DataFormatError, match="no document"):
        job(tmp_path, "out", {"max_bad_lines": 5})


def test_a_tokenizer_of_another_vocabulary_is_refused(folder, tmp_path):
    small = write_hf_llama(tmp_path / "small", vocab_size=300)
    with pytest.raises(TokenizerError, match=r"340 ids.*vocabulary of 300"):
        job(folder, "out", editing(small))


def test_a_tokenizer_that_spells_otherwise_is_refused(folder, tmp_path):
    from megatron_tokedit.testing.models import train_sentencepiece

    other = write_hf_llama(tmp_path / "other", vocab_size=400)
    train_sentencepiece(
        other / "tokenizer.model", ["zyx wvu tsr qpo nml kji hgf edc ba 987"] * 20, vocab_size=300
    )
    with pytest.raises(TokenizerError, match="gives other ids"):
        job(folder, "out", editing(other))
    shutil.copy(TOKENIZER, other / "tokenizer.model")
    job(folder, "out", editing(other))  # a vocabulary with padding is fine, and never sampled from
    assert IndexedDataset(f"{folder}/out_text_document").sequence(0).max() < VOCAB_SIZE


def test_a_prior_that_names_another_tokenizer_is_refused(monkeypatch, folder, prior):
    from megatron_tokedit.scoring import load

    recorded = replace(load.identify_prior(str(prior)), tokenizer_fingerprint="of another one")
    monkeypatch.setattr(load, "identify_prior", lambda path, backend, known: recorded)
    with pytest.raises(TokenizerError, match="fingerprints"):
        job(folder, "out", editing(prior))


def test_what_stands_before_a_document(monkeypatch, folder, prior):
    from megatron_tokedit.pipeline.resources import find_prior
    from megatron_tokedit.scoring import load
    from megatron_tokedit.tokenizers import load_tokenizer

    config = preprocess_config(settings(folder, "out", **editing(prior)))
    tokenizer = load_tokenizer("SentencePieceTokenizer", TOKENIZER)
    assert find_prior(config, tokenizer).options.start_id == tokenizer.bos
    trained_on_bin = replace(load.identify_prior(str(prior)), start_id=tokenizer.eod)
    monkeypatch.setattr(load, "identify_prior", lambda path, backend, known: trained_on_bin)
    assert find_prior(config, tokenizer).options.start_id == tokenizer.eod


def test_dry_run_touches_nothing_and_finds_every_problem(folder, prior):
    before = sorted(folder.iterdir())
    report = inspect_job(preprocess_config(settings(folder, "out", **editing(prior))))
    assert report.problems == []
    assert any("40 documents" in line for line in report.lines)
    config = preprocess_config(
        settings(folder, "out", **editing(prior, prior_context=1000, input=["missing.jsonl"]))
    )
    problems = "\n".join(inspect_job(config).problems)
    assert "missing.jsonl" in problems
    assert "context of 1000 tokens" in problems
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "5"}, (4, 5)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "20",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_STEP": "10",
            },
            (2, 3),
        ),
    ],
)
def test_placement(environment, expected):
    assert placement(environment) == expected
    assert placement(environment, 1, 2) == (1, 2)


def test_placement_refuses_nonsense():
    for arguments in (({}, 1, None), ({}, 2, 2), ({"RANK": "x", "WORLD_SIZE": "2"}, None, None)):
        with pytest.raises(ConfigError):
            placement(*arguments)
