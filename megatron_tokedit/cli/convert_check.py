"""Whether a converted model is the model it was made from: both score a text, token by token.

Invariant: the two are loaded one after the other, so the check takes the memory of one model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_tokedit.errors import CheckpointError, ConfigError, DataFormatError
from megatron_tokedit.log import get_logger
from megatron_tokedit.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megatron_tokedit.scoring.identity import PriorIdentity

logger = get_logger(__name__)

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
_BATCH_TOKENS = 4096
"""In one forward pass, or one window if that is longer."""
_LOGITS_BYTES = 128 << 20


def check_conversion(
    source: Path,
    converted: Path,
    tokenizer: Tokenizer,
    *,
    start_id: int | None,
    text_file: str | None,
    num_tokens: int,
    context_tokens: int,
    tolerance: float | None,
    dtype: str,
) -> None:
    """Score a text with both models and compare the log-probability of every token.

    Args:
        source: the input of the conversion.
        converted: its output.
        tokenizer: of both.
        start_id: the id that both begin a document with.
        text_file: UTF-8 text; default: a part of Python's language reference.
        num_tokens: of the text, from its beginning.
        context_tokens: of a window, where both models take as many; windows overlap.
        tolerance: largest difference, in nats; default: by the precision.
        dtype: both are scored in.

    Raises:
        CheckpointError: they differ by more.
        ConfigError: a text without tokens, or windows without any.
        DataFormatError: the text cannot be read.
        PriorError: one of the models cannot be loaded.
    """
    from megatron_tokedit.scoring.load import identify_prior

    tolerance = _TOLERANCE[dtype] if tolerance is None else tolerance
    ids = _ids(tokenizer, text_file, num_tokens)
    if context_tokens < 2:
        raise ConfigError(f"--check-context: {context_tokens}, expected 2 tokens or more")
    identities = [identify_prior(str(path)) for path in (source, converted)]
    length = min(context_tokens, len(ids), *(identity.max_context_tokens for identity in identities))
    expected, found = (_logprobs(identity, ids, length, start_id, dtype) for identity in identities)
    differences = np.abs(expected - found)
    logger.info(
        "check: %d tokens in %s, in windows of %d: mean log-probability %.6f and %.6f; largest difference "
        "%.3g nats, mean %.3g",
        len(differences),
        dtype,
        length,
        expected.mean(),
        found.mean(),
        differences.max(),
        differences.mean(),
    )
    if not differences.max() <= tolerance:
        raise CheckpointError(
            f"--check: {source} and its conversion differ by up to {differences.max():.3g} nats a token "
            f"(mean {differences.mean():.3g}), more than {tolerance:g}; the conversion was not kept. If the "
            "largest is plausible as rounding, give --check-tolerance"
        )


def _ids(tokenizer: Tokenizer, text_file: str | None, num_tokens: int) -> npt.NDArray[np.int32]:
    """The beginning of the text."""
    ids = np.asarray(tokenizer.encode(_text(text_file)), np.int32)[:num_tokens]
    if len(ids) < 2:
        raise ConfigError("--check-text, --check-tokens: fewer than two tokens to compare")
    return ids


def _logprobs(
    identity: PriorIdentity, ids: npt.NDArray[np.int32], length: int, start_id: int | None, dtype: str
) -> npt.NDArray[np.float64]:
    """Log-probabilities of all tokens that have one, in windows of a length; the model is gone afterwards."""
    from megatron_tokedit.scoring.load import load_scorer, scoring_options

    options = scoring_options(
        identity,
        start_id=start_id,
        context_tokens=length,
        batch_tokens=_BATCH_TOKENS,
        logits_bytes=_LOGITS_BYTES,
    )
    scorer = load_scorer(identity, options, dtype=dtype)
    (scores,) = scorer.score([ids])
    return scores.logprobs_T[~np.isnan(scores.logprobs_T)].astype(np.float64)


def _text(file: str | None) -> str:
    if file is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFormatError(f"--check-text {file}: cannot be read: {error}") from error
