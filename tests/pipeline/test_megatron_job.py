"""A corpus edited with a checkpoint of our own training, in a child process."""

from __future__ import annotations

import sys
from pathlib import Path

import orjson
import pytest
from pipeline_cases import VOCAB_SIZE, editing, output_bytes, settings, write_corpus

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.dataset import read_manifest
from megatron_tokedit.pipeline import run
from megatron_tokedit.testing.models import tiny_llama

sys.path.append(str(Path(__file__).resolve().parents[1] / "engine"))


def save_checkpoint(folder, model, vocab_size):
    import engine_cases

    engine_cases.start(model, tp=2, vocab_size=vocab_size).save(folder, 1)


@pytest.mark.usefixtures("forked_workers")
def test_a_checkpoint_edits_a_corpus(ranks, tmp_path):
    ranks.run(save_checkpoint, tmp_path / "run", tiny_llama(), VOCAB_SIZE, world_size=2)
    write_corpus(tmp_path / "corpus.jsonl")
    for name, workers in (("one", 1), ("two", 2)):
        config = preprocess_config(settings(tmp_path, name, **editing(tmp_path / "run", workers=workers)))
        assert run(config, isolate=True).outcome == "merged"
    assert output_bytes(tmp_path, "one") == output_bytes(tmp_path, "two")
    edit = orjson.loads((tmp_path / "one_text_document.stats.json").read_bytes())["edit"]
    assert edit["changed"] > 0
    assert edit["scored"] == edit["tokens"]
    prior = read_manifest(f"{tmp_path}/one_text_document").prior
    assert prior["backend"] == "megatron"
    assert prior["path"].endswith("step_00000001")
