"""The tokenizer and the sources of a training run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from megatron_tokedit.config.base import Section


class TokenizerConfig(Section):
    """The tokenizer that the data were written with and that the checkpoint records."""

    type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"]
    """Megatron-LM's name of the tokenizer type."""
    model: str = Field(min_length=1)
    """A sentencepiece ``.model`` file, or a Hugging Face tokenizer folder."""


class SourceConfig(Section):
    """One dataset."""

    name: str = Field(min_length=1)
    prefix: str = Field(min_length=1)
    """Names ``PREFIX.bin`` and ``PREFIX.idx``. With ``input`` it ends in ``_KEY_document``, the name that
    ``tools/preprocess_edit.py`` writes under (KEY is ``text`` unless ``edit.json_keys`` says otherwise)."""
    weight: PositiveFloat = 1.0
    """Relative share of this source in the blend."""
    input: list[str] | None = Field(None, min_length=1)
    """Raw text files; ``tools/train.py`` makes the dataset from them if it is not there."""
    edit: dict[str, object] | None = None
    """Settings of ``tools/preprocess_edit.py`` for ``input``, under its flag names with underscores."""


class DataConfig(Section):
    """Training and validation sources. Relative paths start at the folder the command is run in."""

    train: list[SourceConfig] = Field(min_length=1)
    validation: list[SourceConfig] = Field(default_factory=list)
    """Each is measured on its own, under its name."""
    cache_dir: str | None = None
    """Index cache of megatron-core's dataset builders; default ``RUN_DIR/index_cache``."""
    num_workers: NonNegativeInt = 0
    """Data-loader processes a rank."""
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
