"""The edit method of a job: from its settings to rules, sampler, editor and what is asked of the scorer.

Invariant: every setting that can change an edit is in :func:`edit_settings`, which goes into the plan and the
manifest.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_tokedit.config.preprocess import DEFAULT_TOP_K, PreprocessConfig
from megatron_tokedit.edit.editor import EditMethod, Editor
from megatron_tokedit.edit.rules import Rules, preset, rules_from_config
from megatron_tokedit.edit.samplers import Rejection, Sampler, TopK, TopP
from megatron_tokedit.scoring.base import CandidateRequest, Nucleus
from megatron_tokedit.tokenizers import Tokenizer


def edit_method(config: PreprocessConfig, generation: int = 1) -> EditMethod:
    """The edit method of a configuration.

    Raises:
        ConfigError: a rule is not one.
    """
    return EditMethod(
        rules=_rules(config),
        sampler=_sampler(config),
        seed=config.seed,
        generation=generation,
        exclude_original=config.edit_exclude_original,
    )


def _rules(config: PreprocessConfig) -> Rules:
    """The rules of a strategy, or the free ones."""
    if config.edit_rules is not None:
        return rules_from_config(config.edit_rules)
    return preset(
        config.edit_strategy, threshold=config.edit_threshold, low_threshold=config.edit_low_threshold
    )


def _sampler(config: PreprocessConfig) -> Sampler:
    """The sampler with its defaults."""
    if config.edit_sampler == "top_p":
        return TopP(config.edit_top_p, config.temperature, config.top_k)
    kind = Rejection if config.edit_sampler == "rejection" else TopK
    return kind(config.top_k or DEFAULT_TOP_K, config.temperature)


def edit_settings(config: PreprocessConfig, generation: int | None = None) -> dict[str, Any]:
    """Every edit setting, for the plan and the manifest.

    Args:
        config: the job.
        generation: which of its datasets; default: the last.

    Raises:
        ConfigError: a rule is not one.
    """
    rules = _rules(config)
    resamples = bool(rules.resample_intervals)
    return {
        "strategy": config.strategy,
        "rules": rules.to_json(),
        "sampler": config.edit_sampler if resamples else None,
        "top_k": config.top_k if resamples else None,
        "top_p": config.edit_top_p if resamples and config.edit_sampler == "top_p" else None,
        "temperature": config.temperature if resamples else None,
        "exclude_original": config.edit_exclude_original,
        "generation": generation or config.edit_generations,
        "generations": config.edit_generations,
        "seed": config.seed,
        "output_round_trip": config.output_round_trip if config.output_tokenizer_model else None,
        **({"score_without_prompt": config.sft_score_without_prompt} if config.is_sft else {}),
    }


def make_editor(config: PreprocessConfig, tokenizer: Tokenizer, generation: int = 1) -> Editor:
    """The editor of one generation of a job."""
    return Editor(
        edit_method(config, generation),
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        bos=tokenizer.bos,
        incomplete_utf8=tokenizer.incomplete_utf8,
    )


def candidate_request(method: EditMethod, tokenizer: Tokenizer, vocab_size: int) -> CandidateRequest:
    """What to ask of the scorer: no special tokens, and no ids that the tokenizer does not have.

    Args:
        method: of the edit.
        tokenizer: the prior's.
        vocab_size: of the prior, which may have more ids than the tokenizer.
    """
    beyond = range(tokenizer.vocab_size, vocab_size)
    sampler = method.sampler
    return CandidateRequest(
        num_candidates=sampler.num_candidates,
        intervals=method.rules.resample_intervals,
        excluded_ids=tuple(sorted(tokenizer.special_ids | set(beyond))),
        nucleus=Nucleus(*sampler.nucleus) if sampler.nucleus else None,
    )


def useless_sampler(config: PreprocessConfig) -> str | None:
    """Why no draw of a configuration can change a token; None where one may.

    At a temperature of 1 or less a token with p >= top_p is its own nucleus.
    """
    lows = [math.exp(low) for low, _ in edit_method(config).rules.resample_intervals]
    narrow = config.edit_sampler == "top_p" and config.temperature <= 1.0 and not config.edit_exclude_original
    if narrow and lows and min(lows) >= config.edit_top_p:
        return (
            f"every resampled token has p >= {min(lows):.4g}, so at temperature {config.temperature} the "
            f"nucleus of top_p {config.edit_top_p} is that token alone and nothing will change; raise "
            "--edit-temperature or --edit-top-p"
        )
    return None
