"""Weights and token budgets, caps, domains and prefixes of data sources."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_tokedit.config.data import DataConfig, SourceConfig, parse_count
from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.sections import TokenizerConfig
from megatron_tokedit.config.validate import cross_section_faults
from megatron_tokedit.dataset.sources import asked_shares, domains_of

TOKENIZER = TokenizerConfig(type="SentencePieceTokenizer", model="a.model")


def faults(data: DataConfig, seed: int = 1) -> list[str]:
    found: list[Fault] = cross_section_faults({"data": data, "tokenizer": TOKENIZER, "seed": seed})
    return [str(fault) for fault in found]


def source(name: str = "a", **fields: Any) -> SourceConfig:
    return SourceConfig.model_validate({"name": name, "prefix": name, **fields}, strict=True)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        (30_000_000_000, 30_000_000_000),
        ("30B", 30_000_000_000),
        ("1.5T", 1_500_000_000_000),
        ("500m", 500_000_000),
        ("0.25 K", 250),
        ("12_000", 12_000),
        (3e9, 3_000_000_000),
    ],
)
def test_token_budgets(given: object, tokens: int) -> None:
    assert parse_count(given) == tokens
    assert source(tokens=given).tokens == tokens


@pytest.mark.parametrize("given", ["30 billion", "B", "", "-3B", "1e9", 2.5, 0, -1, True])
def test_no_token_budget(given: object) -> None:
    with pytest.raises(ValidationError):
        source(tokens=given)


def test_a_blend_is_all_weights_or_all_budgets() -> None:
    data = DataConfig(train=[source("a"), source("b", tokens="2B"), source("c", tokens=5, weight=1.0)])
    assert faults(data) == [
        "data.train.0.tokens: missing: data.train.1 has a token budget, and a blend is all budgets or all "
        "weights",
        "data.train.2.weight: got 1 beside a budget of 5 tokens; give one of them",
    ]
    assert asked_shares(DataConfig(train=[source("a"), source("b", weight=2.0)])) == (
        {"a": 1.0, "b": 2.0},
        False,
    )
    assert asked_shares(DataConfig(train=[source("a", tokens="2K")])) == ({"a": 2000.0}, True)


def test_settings_without_effect_are_refused() -> None:
    held = source("h", weight=2.0, tokens=5, max_epochs=1.0)
    found = faults(DataConfig(train=[source("a", domain="law")], validation=[held]))
    assert [fault.split(":")[0] for fault in found] == [
        "data.train.0.domain",
        "data.validation.0.weight",
        "data.validation.0.tokens",
        "data.validation.0.max_epochs",
    ]


def test_domains() -> None:
    held = [source("x", domain="law"), source("y"), source("z", domain="law"), source("w", domain="news")]
    assert domains_of(DataConfig(train=[source("a")], validation=held)) == {"law": ["x", "z"], "news": ["w"]}


def test_a_source_is_a_dataset_or_raw_text() -> None:
    assert faults(DataConfig(train=[SourceConfig(name="a")])) == [
        "data.train.0.prefix: missing; give the dataset's prefix, or raw text files as `input`"
    ]
    edit: dict[str, object] = {"edit_strategy": "none"}
    raw = SourceConfig(name="a", input=["a.jsonl"], edit=edit)
    assert faults(DataConfig(train=[raw])) == []
    several = SourceConfig(name="a", input=["a.jsonl"], edit={**edit, "json_keys": ["text", "body"]})
    (fault,) = faults(DataConfig(train=[several]))
    assert "edit.json_keys names several datasets (text, body): give a prefix" in fault


def test_a_seed_that_numpy_takes() -> None:
    data = DataConfig(train=[source()])
    assert faults(data, seed=2**32 - 1) == []
    assert "expected less than 2**32" in faults(data, seed=2**32)[0]
