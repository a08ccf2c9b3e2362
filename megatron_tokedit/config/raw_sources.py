"""A training source that starts from raw text: which preprocessing job makes its dataset.

Invariant: the job is the one that ``tools/preprocess_edit.py`` runs for the same settings, and its output is
the source's ``prefix``.
"""

from __future__ import annotations

from megatron_tokedit.config.preprocess import PreprocessConfig, preprocess_config
from megatron_tokedit.config.sections import SourceConfig, TokenizerConfig
from megatron_tokedit.errors import ConfigError

_GIVEN_ELSEWHERE = {
    "input": "the source's own `input`",
    "output_prefix": "the source's `prefix`",
    "tokenizer_type": "tokenizer.type",
    "tokenizer_model": "tokenizer.model",
    "output_tokenizer_type": "tokenizer.type",
    "output_tokenizer_model": "tokenizer.model",
}
_PRIOR_TOKENIZER = ("prior_tokenizer_type", "prior_tokenizer_model")


def preprocessing_of(source: SourceConfig, tokenizer: TokenizerConfig) -> PreprocessConfig:
    """The preprocessing job of a source with ``input``.

    ``prior_tokenizer_type`` and ``prior_tokenizer_model`` in ``edit`` name the prior's tokenizer where it is
    not the run's; the edited text is then encoded again.

    Raises:
        ConfigError: a setting of ``edit`` is unknown, wrong, or belongs elsewhere.
    """
    settings = dict(source.edit or {})
    misplaced = [
        f"{name}: taken from {owner}" for name, owner in _GIVEN_ELSEWHERE.items() if name in settings
    ]
    if misplaced:
        raise ConfigError("; ".join(misplaced) + "; remove it from `edit`")
    found = output_prefix_and_key(source)
    settings |= {
        "input": source.input,
        "output_prefix": found[0] if found else source.prefix,
        "tokenizer_type": tokenizer.type,
        "tokenizer_model": tokenizer.model,
    }
    if any(name in settings for name in _PRIOR_TOKENIZER):
        settings |= {"output_tokenizer_type": tokenizer.type, "output_tokenizer_model": tokenizer.model}
        settings |= {name.removeprefix("prior_"): settings.pop(name, None) for name in _PRIOR_TOKENIZER}
    return preprocess_config(settings, origin="settings")


def json_keys(source: SourceConfig) -> list[str]:
    """The JSON keys that a raw source is made from (``edit.json_keys``; ``text`` by default)."""
    keys = (source.edit or {}).get("json_keys", ["text"])
    return [str(key) for key in keys] if isinstance(keys, list) and keys else ["text"]


def output_prefix_and_key(source: SourceConfig) -> tuple[str, str] | None:
    """A raw source's prefix as the preprocessor's output prefix and JSON key; None if it does not fit."""
    for key in json_keys(source):
        stem = source.prefix.removesuffix(f"_{key}_document")
        if stem not in ("", source.prefix) and not stem.endswith("/"):
            return stem, key
    return None
