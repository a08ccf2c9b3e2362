"""A training source that starts from raw text: which preprocessing job makes its dataset.

Invariant: the job is the one that ``tools/preprocess_edit.py`` runs for the same settings, and its output is
the source's ``prefix``, where it has one.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_tokedit.config.preprocess import SFT_KEY, PreprocessConfig, preprocess_config
from megatron_tokedit.config.sections import RunConfig, SourceConfig, TokenizerConfig
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


UNPLACED = "unplaced"
"""Output prefix of the job of a source without a ``prefix``, until it is known where its dataset lies."""


def preprocessing_of(source: SourceConfig, tokenizer: TokenizerConfig) -> PreprocessConfig:
    """The preprocessing job of a source with ``input``; its output is :data:`UNPLACED` without a ``prefix``.

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
        "output_prefix": found[0] if found else source.prefix or UNPLACED,
        "tokenizer_type": tokenizer.type,
        "tokenizer_model": tokenizer.model,
    }
    if any(name in settings for name in _PRIOR_TOKENIZER):
        settings |= {"output_tokenizer_type": tokenizer.type, "output_tokenizer_model": tokenizer.model}
        settings |= {name.removeprefix("prior_"): settings.pop(name, None) for name in _PRIOR_TOKENIZER}
    return preprocess_config(settings, origin="settings")


def json_keys(source: SourceConfig) -> list[str]:
    """The JSON keys that a raw source is made from (``edit.json_keys``; ``text`` by default, ``sft`` for
    conversations).
    """
    if (source.edit or {}).get("format") == "sft":
        return [SFT_KEY]
    keys = (source.edit or {}).get("json_keys", ["text"])
    return [str(key) for key in keys] if isinstance(keys, list) and keys else ["text"]


def output_prefix_and_key(source: SourceConfig) -> tuple[str, str] | None:
    """A raw source's prefix as the preprocessor's output prefix and JSON key; None without one that fits."""
    if source.prefix is None:
        return None
    for key in json_keys(source):
        stem = source.prefix.removesuffix(f"_{key}_document")
        if stem not in ("", source.prefix) and not stem.endswith("/"):
            return stem, key
    return None


def with_prefixes(config: RunConfig, place: Callable[[PreprocessConfig], str | None]) -> RunConfig:
    """The configuration with the prefixes of raw sources that have none.

    Args:
        config: the run's.
        place: the output prefix of a job; None where it is not known, then the source stays without.
    """

    def located(source: SourceConfig) -> SourceConfig:
        if source.prefix is not None or source.input is None:
            return source
        output_prefix = place(preprocessing_of(source, config.tokenizer))
        if output_prefix is None:
            return source
        prefix = f"{output_prefix}_{json_keys(source)[0]}_document"
        return source.model_copy(update={"prefix": prefix})

    splits = {"train": config.data.train, "validation": config.data.validation}
    update = {name: [located(source) for source in sources] for name, sources in splits.items()}
    return config.model_copy(update={"data": config.data.model_copy(update=update)})
