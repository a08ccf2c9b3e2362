# ruff: noqa: E501 - tables of messages read better unbroken
"""What involves two sections is checked with the arithmetic in the message."""

from __future__ import annotations

from typing import Any

import pytest
from config_cases import run_config

from megatron_tokedit.config.raw_sources import output_prefix_and_key, preprocessing_of
from megatron_tokedit.config.sections import SourceConfig, TokenizerConfig
from megatron_tokedit.config.validate import validate
from megatron_tokedit.errors import ConfigError

TOKENIZER = TokenizerConfig(type="SentencePieceTokenizer", model="a.model")


def raw(**fields: Any) -> dict[str, Any]:
    return {
        "name": "r",
        "prefix": "d/r_text_document",
        "input": ["r.jsonl"],
        "edit": {"edit_strategy": "none"},
        **fields,
    }


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        ({"model__hidden_size": 66}, None, "model.hidden_size: 66 is not a multiple of num_attention_heads = 4; set kv_channels, or try 64 or 68"),
        ({"model__num_query_groups": 3}, None, "model.num_query_groups: 3 does not divide num_attention_heads = 4"),
        ({"model__kv_channels": 15}, None, "model.kv_channels: a head of 15 channels is odd"),
        ({"model__family": "gpt2", "model__max_position_embeddings": 16}, None, "32 tokens do not fit the 16 learned positions"),
        ({"data__reset_position_ids": True}, None, "data.reset_position_ids: has no effect on rotary positions"),
        ({"model__num_query_groups": 2, "parallel__tensor_model_parallel_size": 4}, None, "4 does not divide model.num_query_groups = 2: 2 / 4 = 0.5; sizes that do: 1, 2"),
        ({"model__ffn_hidden_size": 190, "parallel__tensor_model_parallel_size": 4}, None, "4 does not divide model.ffn_hidden_size = 190"),
        ({"parallel__pipeline_model_parallel_size": 3}, None, "3 does not divide model.num_layers = 4; sizes that do: 1, 2, 4"),
        ({"parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2}, 6, "6 ranks cannot be divided into copies of the model of tensor_model_parallel_size x pipeline_model_parallel_size = 2 x 2 = 4 ranks each"),
        ({"training__micro_batch_size": 2}, 3, "8 is not a multiple of micro_batch_size x data-parallel size = 2 x 3 = 6 (data-parallel size = 3 ranks / 1); try 6 or 12"),
        ({"training__micro_batch_size": 16}, None, "8 is not a multiple of micro_batch_size = 16; try 16"),
        ({"schedule__lr_warmup_steps": 10}, None, "schedule.lr_warmup_steps: 10 must be smaller than lr_decay_steps = 10 (training.train_steps)"),
        ({"schedule__lr_warmup_steps": 9, "schedule__lr_decay_steps": 5}, None, "9 must be smaller than lr_decay_steps = 5"),
        ({"optimizer__min_lr": 1.0}, None, "optimizer.min_lr: 1.0 is larger than lr = 0.001"),
        ({"checkpoint__keep_last": 2}, None, "checkpoint.keep_last: 2 has nothing to choose from"),
        ({"data__train": [{"name": "a", "prefix": "x.bin"}]}, None, "got 'x.bin', expected 'x' (without .bin)"),
        ({"data__train": [{"name": "a", "prefix": "x", "edit": {}}]}, None, "data.train.0.edit: there is nothing to edit"),
        ({"data__train": [raw(prefix="d/r")]}, None, "expected a name that ends in _text_document, because the dataset is made from `input` under its JSON key: d/r_text_document"),
        ({"data__train": [raw(edit={"edit_strategy": "none", "json_keys": ["body"]})]}, None, "expected a name that ends in _body_document"),
        ({"data__train": [raw(edit={"edit_strategi": "none"})]}, None, "edit_strategi: unknown setting; did you mean edit_strategy?"),
        ({"data__train": [raw(edit={})]}, None, "prior: missing"),
        ({"data__train": [raw(edit={"edit_strategy": "none", "output_prefix": "x"})]}, None, "output_prefix: taken from the source's `prefix`; remove it from `edit`"),
    ],
)  # fmt: skip
def test_fault(changes: dict[str, Any], world_size: int | None, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(run_config(**changes), world_size)
    assert expected in str(error.value)
    assert "1 problem" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, None),
        ({}, 8),
        ({"model__hidden_size": 66, "model__kv_channels": 16}, 1),
        ({"parallel__tensor_model_parallel_size": 2, "parallel__pipeline_model_parallel_size": 2}, 16),
        ({"data__train": [raw()], "data__validation": [{"name": "r", "prefix": "v"}]}, 1),
    ],
)
def test_sound(changes: dict[str, Any], world_size: int | None) -> None:
    validate(run_config(**changes), world_size)


def test_preprocessing_job_of_a_source() -> None:
    source = SourceConfig(**raw(prefix="d/r_body_document", edit={"edit_strategy": "none", "json_keys": ["text", "body"], "append_eod": True}))  # fmt: skip
    job = preprocessing_of(source, TOKENIZER)
    assert (job.output_prefix, job.json_keys, job.append_eod) == ("d/r", ["text", "body"], True)
    assert (job.input, job.tokenizer_model) == (["r.jsonl"], "a.model")
    assert output_prefix_and_key(source) == ("d/r", "body")


def test_the_tokenizer_of_a_sources_prior() -> None:
    edit = {"prior": "p", "prior_tokenizer_type": "HuggingFaceTokenizer", "prior_tokenizer_model": "./p"}
    job = preprocessing_of(SourceConfig(**raw(edit=edit)), TOKENIZER)
    assert (job.tokenizer_type, job.tokenizer_model) == ("HuggingFaceTokenizer", "./p")
    assert (job.output_tokenizer_type, job.output_tokenizer_model) == ("SentencePieceTokenizer", "a.model")
    with pytest.raises(ConfigError, match=r"output_tokenizer_model: taken from tokenizer\.model"):
        preprocessing_of(SourceConfig(**raw(edit={"output_tokenizer_model": "x"})), TOKENIZER)
    with pytest.raises(ConfigError, match=r"tokenizer_type: missing"):
        preprocessing_of(SourceConfig(**raw(edit={"prior": "p", "prior_tokenizer_model": "./p"})), TOKENIZER)


@pytest.mark.parametrize("prefix", ["_text_document", "d/_text_document", "d/r_text", "d/r"])
def test_prefix_that_names_no_output(prefix: str) -> None:
    assert output_prefix_and_key(SourceConfig(**raw(prefix=prefix))) is None
