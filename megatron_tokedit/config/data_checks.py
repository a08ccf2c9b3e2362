"""Checks of the data sources, alone and against model and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_tokedit.config.data import DataConfig, SourceConfig, TokenizerConfig
from megatron_tokedit.config.faults import Fault, KeyPath
from megatron_tokedit.config.model import ModelConfig
from megatron_tokedit.config.raw_sources import json_keys, output_prefix_and_key, preprocessing_of
from megatron_tokedit.errors import ConfigError


def _sources(data: DataConfig) -> Iterator[Fault]:
    for split, sources in (("train", data.train), ("validation", data.validation)):
        first_index: dict[str, int] = {}
        for index, source in enumerate(sources):
            path = ("data", split, index)
            first = first_index.setdefault(source.name, index)
            if first != index:
                yield Fault((*path, "name"), f"{source.name!r} is also the name of data.{split}.{first}")
            yield from _prefix(path, source)


def _prefix(path: KeyPath, source: SourceConfig) -> Iterator[Fault]:
    if source.prefix is None:
        yield from _no_prefix(path, source)
        return
    for suffix in (".bin", ".idx"):
        if source.prefix.endswith(suffix):
            yield Fault(
                (*path, "prefix"),
                f"got {source.prefix!r}, expected {source.prefix.removesuffix(suffix)!r} (without {suffix})",
            )
    if source.input is not None and output_prefix_and_key(source) is None:
        key = json_keys(source)[0]
        yield Fault(
            (*path, "prefix"),
            f"got {source.prefix!r}, expected a name that ends in _{key}_document, because the dataset is "
            f"made from `input` under its JSON key: {source.prefix}_{key}_document",
        )


def _no_prefix(path: KeyPath, source: SourceConfig) -> Iterator[Fault]:
    if source.input is None:
        yield Fault((*path, "prefix"), "missing; give the dataset's prefix, or raw text files as `input`")
    elif len(keys := json_keys(source)) > 1:
        yield Fault(
            (*path, "prefix"),
            f"missing, and edit.json_keys names several datasets ({', '.join(keys)}): give a prefix that "
            f"ends in _KEY_document, or one key",
        )


def _shares(data: DataConfig) -> Iterator[Fault]:
    budgets = [index for index, source in enumerate(data.train) if source.tokens is not None]
    for index, source in enumerate(data.train):
        if source.tokens is not None and source.weight is not None:
            yield Fault(
                ("data", "train", index, "weight"),
                f"got {source.weight:g} beside a budget of {source.tokens:,} tokens; give one of them",
            )
        elif budgets and source.tokens is None:
            yield Fault(
                ("data", "train", index, "tokens"),
                f"missing: data.train.{budgets[0]} has a token budget, and a blend is all budgets or all "
                f"weights",
            )


def _idle_settings(data: DataConfig) -> Iterator[Fault]:
    """What has no effect on a source of this split."""
    for index, source in enumerate(data.train):
        if source.domain is not None:
            yield Fault(
                ("data", "train", index, "domain"),
                "has an effect on validation sources only, whose loss is averaged by domain; remove it",
            )
    for index, source in enumerate(data.validation):
        for name, default in (("weight", 1.0), ("tokens", None), ("max_epochs", None)):
            if (value := getattr(source, name)) not in (None, default):
                yield Fault(
                    ("data", "validation", index, name),
                    f"got {value}, but a validation source is measured on its own, at most once over; "
                    f"remove it",
                )


def _seed(seed: int) -> Iterator[Fault]:
    if seed >= 2**32:
        yield Fault(
            ("seed",), f"got {seed}, expected less than 2**32 = {2**32}: numpy's generators take no more"
        )


def _edits(data: DataConfig, tokenizer: TokenizerConfig) -> Iterator[Fault]:
    for split, sources in (("train", data.train), ("validation", data.validation)):
        for index, source in enumerate(sources):
            path = ("data", split, index, "edit")
            if source.input is not None:
                try:
                    preprocessing_of(source, tokenizer)
                except ConfigError as error:
                    yield Fault(path, str(error))
            elif source.edit is not None:
                yield Fault(path, "there is nothing to edit: `input` (raw text files) is not given")


def _position_resets(model: ModelConfig, data: DataConfig) -> Iterator[Fault]:
    if data.reset_position_ids and not data.reset_attention_mask and model.family_traits.uses_rope:
        yield Fault(
            ("data", "reset_position_ids"),
            "has no effect on rotary positions, which are relative; remove it, or separate the documents "
            "with reset_attention_mask",
        )


CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _sources,
    _shares,
    _idle_settings,
    _seed,
    _edits,
    _position_resets,
)
