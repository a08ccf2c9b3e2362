"""Editing an edited corpus again: one dataset, one journal, one stats file a generation."""

from __future__ import annotations

import numpy as np
import orjson
import pytest
from pipeline_cases import TOKENIZER, VOCAB_SIZE, editing, output_bytes, settings, write_corpus

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.dataset import IndexedDataset, read_manifest, undo_dataset, verify_dataset
from megatron_tokedit.edit.editor import Candidates
from megatron_tokedit.edit.random import document_key
from megatron_tokedit.pipeline import run
from megatron_tokedit.pipeline.method import candidate_request, make_editor
from megatron_tokedit.pipeline.resources import find_prior, load_prior
from megatron_tokedit.scoring.scorer import CausalScorer
from megatron_tokedit.testing.models import write_hf_llama
from megatron_tokedit.tokenizers import load_tokenizer

NAMES = ("text_generation1", "text_generation2", "text")


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return write_hf_llama(tmp_path_factory.mktemp("prior") / "llama", vocab_size=VOCAB_SIZE)


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    return tmp_path


def job(folder, name, **changes):
    return run(preprocess_config(settings(folder, name, **changes)))


DROPPING = {"edit_strategy": "low_drop_up_revise", "edit_low_threshold": 0.0028}


@pytest.mark.parametrize("changes", [{}, DROPPING], ids=["replace", "drop"])
def test_every_generation_is_a_dataset_that_can_be_undone(folder, prior, changes):
    result = job(folder, "out", **editing(prior, edit_generations=3, **changes))
    job(folder, "plain")
    assert tuple(result.prefixes) == NAMES
    tokens = []
    for generation, name in enumerate(NAMES, 1):
        prefix = f"{folder}/out_{name}_document"
        verify_dataset(prefix, vocab_size=VOCAB_SIZE)
        manifest = read_manifest(prefix)
        assert (manifest.edit["generation"], manifest.edit["generations"]) == (generation, 3)
        assert manifest.json_key == "text"
        undo_dataset(prefix, f"{folder}/undone{generation}_text_document")
        assert output_bytes(folder, f"undone{generation}") == output_bytes(folder, "plain")
        edit = orjson.loads((folder / f"out_{name}_document.stats.json").read_bytes())["edit"]
        assert edit["changed"] > 0
        tokens.append(edit["tokens"])
    assert tokens[0] >= tokens[1] >= tokens[2]
    assert (tokens[2] < tokens[0]) == bool(changes)


def test_the_first_generation_is_that_of_a_job_with_one(folder, prior):
    job(folder, "three", **editing(prior, edit_generations=3))
    job(folder, "one", **editing(prior))
    suffixes = (".bin", ".idx", ".edits")
    assert output_bytes(folder, "three", "text_generation1", suffixes) == output_bytes(
        folder, "one", "text", suffixes
    )


def test_generations_are_edits_of_edits(folder, prior):
    """The second generation by hand: score what the first wrote, edit with generation 2's random numbers."""
    config = preprocess_config(settings(folder, "out", **editing(prior, edit_generations=2)))
    run(config)
    tokenizer = load_tokenizer("SentencePieceTokenizer", TOKENIZER)
    scorer = load_prior(find_prior(config, tokenizer))
    editor = make_editor(config, tokenizer, 2)
    request = candidate_request(editor.method, tokenizer, scorer.vocab_size)
    first = IndexedDataset(f"{folder}/out_text_generation1_document")
    second = IndexedDataset(f"{folder}/out_text_document")
    texts = [orjson.loads(line)["text"] for line in (folder / "corpus.jsonl").read_bytes().splitlines()]
    changed = 0
    for index, text in enumerate(texts):
        sequences = [np.asarray(ids, np.int32) for ids in first.document(index)]
        if not sequences:
            continue
        sequences[-1] = sequences[-1][:-1]  # without the end-of-document id
        (score,) = scorer.score([np.concatenate(sequences)], request)
        candidates = Candidates(
            score.candidate_positions_E, score.candidate_ids_EK, score.candidate_logprobs_EK
        )
        key = document_key(text if isinstance(text, list) else [text])
        edited = editor.edit(sequences, score.logprobs_T, candidates, key)
        expected = np.concatenate([*edited.sequences, [tokenizer.eod]])
        assert (np.concatenate(second.document(index)) == expected).all()
        changed += edited.num_changed
    assert changed > 50


@pytest.mark.usefixtures("forked_workers")
def test_any_number_of_workers_and_units(folder, prior):
    job(folder, "a", **editing(prior, edit_generations=2, workers=2, unit_documents=5))
    job(folder, "b", **editing(prior, edit_generations=2, workers=1, unit_documents=100))
    for name in ("text_generation1", "text"):
        for suffix in (".bin", ".idx", ".edits"):
            assert output_bytes(folder, "a", name, (suffix,)) == output_bytes(folder, "b", name, (suffix,))


def test_an_open_nucleus_is_drawn_from_slice_by_slice(folder, prior, monkeypatch):
    """Its candidates may be all ids for every token, so those of a few documents only lie in memory."""
    calls = []
    score = CausalScorer.score

    def counted(scorer, documents, *args, **kwargs):
        calls.append([len(ids) for ids in documents])
        return score(scorer, documents, *args, **kwargs)

    monkeypatch.setattr(CausalScorer, "score", counted)
    changes = {"edit_sampler": "top_p", "edit_generations": 2, "unit_documents": 40}
    job(folder, "open", **editing(prior, **changes))
    assert len(calls) > 6
    assert all(sum(lengths[:-1]) < 200 for lengths in calls)
    calls.clear()
    job(folder, "bounded", **editing(prior, edit_top_k=VOCAB_SIZE, **changes))
    assert len(calls) == 2
    for name in ("text_generation1", "text"):
        assert output_bytes(folder, "open", name) == output_bytes(folder, "bounded", name)
