"""What a job says and forgives before any unit is done: typing errors, settings without effect, dry runs."""

from __future__ import annotations

import logging

import pytest
from pipeline_cases import editing, settings, write_corpus

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.errors import DataFormatError, PlanError
from megatron_tokedit.pipeline import run
from megatron_tokedit.pipeline.dry_run import inspect_job


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    return tmp_path


def config(folder, **changes):
    return preprocess_config(settings(folder, "out", **changes))


def test_a_typing_error_does_not_occupy_the_prefix(folder):
    with pytest.raises(DataFormatError, match="titel"):
        run(config(folder, json_keys=["titel"]))
    assert run(config(folder)).outcome == "merged"


def test_a_plan_with_a_finished_unit_is_not_replaced(folder):
    run(config(folder), stage="edit")
    with pytest.raises(PlanError, match="append_eod"):
        run(config(folder, append_eod=False))


def test_settings_without_effect_are_named(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_tokedit"), "propagate", True)
    run(config(folder, prior="/nonexistent", edit_threshold=0.3, edit_top_p=0.9))
    (message,) = {record.message for record in caplog.records if "without effect" in record.message}
    assert message == "without effect with edit_strategy none: edit_threshold, prior"


def test_settings_with_effect_are_not(folder):
    assert config(folder, **editing(folder / "prior")).idle_settings == []
    assert config(folder).idle_settings == []


def test_a_dry_run_reads_the_first_documents(folder):
    assert inspect_job(config(folder)).problems == []
    (problem,) = inspect_job(config(folder, json_keys=["titel"])).problems
    assert "titel" in problem
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    (folder / "corpus.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:]]))
    (problem,) = inspect_job(config(folder)).problems
    assert "corpus.jsonl:2" in problem
    assert inspect_job(config(folder, max_bad_lines=1)).problems == []
    assert not (folder / "out.work").exists()
