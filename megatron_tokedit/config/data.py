"""The tokenizer and the sources of a training run."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_tokedit.config.base import Section

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", re.IGNORECASE)


def parse_count(value: object) -> object:
    """``"30B"``, ``"1.5T"``, ``"500M"`` or ``3e9`` as a whole number; anything else as it is.

    Raises:
        ValueError: text that is no such number.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = _COUNT.fullmatch(value.strip().replace("_", ""))
    if match is None:
        raise ValueError("expected a whole number, or one with K, M, B or T behind it, such as 30B")
    count = float(match[1]) * _UNITS[match[2].upper()]
    return int(match[1]) * _UNITS[match[2].upper()] if "." not in match[1] else round(count)


TokenCount = Annotated[PositiveInt, BeforeValidator(parse_count)]
"""A number of tokens, also as ``30B``."""


class TokenizerConfig(Section):
    """The tokenizer that the data were written with and that the checkpoint records."""

    type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"]
    """Megatron-LM's name of the tokenizer type."""
    model: str = Field(min_length=1)
    """A sentencepiece ``.model`` file, or a Hugging Face tokenizer folder."""


class SourceConfig(Section):
    """One dataset."""

    name: str = Field(min_length=1)
    """What its counter of drawn samples is kept under: a source with another name is another source."""
    prefix: str | None = Field(None, min_length=1)
    """Names ``PREFIX.bin`` and ``PREFIX.idx``. With ``input`` it ends in ``_KEY_document``, the name that
    ``tools/preprocess_edit.py`` writes under (KEY is ``text`` unless ``edit.json_keys`` says otherwise), or
    it is left out: then the dataset lies in ``data.prepared_dir``, named by what it is made from."""
    weight: PositiveFloat | None = None
    """Relative share of this source in the blend; default 1."""
    tokens: TokenCount | None = None
    """Token budget of this source, instead of a weight: ``30_000_000_000`` or ``30B``. The shares of a blend
    with budgets are those of the budgets; how much is drawn is up to ``training.train_steps``."""
    max_epochs: PositiveFloat | None = None
    """A run that would draw more passes over this source than this is refused before its first step."""
    epochs: PositiveFloat | None = None
    """Stage ``sft``: passes over this training source; default ``training.train_epochs``."""
    domain: str | None = Field(None, min_length=1)
    """Validation sources of one domain are also measured together, over the tokens of all of them."""
    input: list[str] | None = Field(None, min_length=1)
    """Raw text files; ``tools/train.py`` makes the dataset from them if it is not there."""
    edit: dict[str, object] | None = None
    """Settings of ``tools/preprocess_edit.py`` for ``input``, under its flag names with underscores."""


class DataConfig(Section):
    """Training and validation sources. Relative paths start at the folder the command is run in."""

    train: list[SourceConfig] = Field(min_length=1, max_length=32766)
    validation: list[SourceConfig] = Field(default_factory=list)
    """Each is measured on its own, under its name."""
    cache_dir: str | None = None
    """Index cache of megatron-core's datasets; default ``RUN_DIR/index_cache``. Runs may share one."""
    prepared_dir: str = Field("data/prepared", min_length=1)
    """Where datasets are made from ``input`` of sources without a ``prefix``. Runs share it: the same input,
    edit, tokenizer and prior are made once, and any change makes a new dataset beside the old one."""
    num_workers: NonNegativeInt = 0
    """Data-loader processes a rank."""
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
