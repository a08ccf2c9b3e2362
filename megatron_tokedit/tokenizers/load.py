"""Choosing a tokenizer by Megatron-LM's names, and describing it for manifests.

Invariant: a tokenizer that cannot be used is refused here, with one message, before any text is read.
"""

from __future__ import annotations

from typing import Any

from megatron_tokedit.errors import TokenizerError
from megatron_tokedit.tokenizers.base import Tokenizer

TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")


def load_tokenizer(
    tokenizer_type: str, tokenizer_model: str, *, split_special_tokens: bool = False
) -> Tokenizer:
    """Load a tokenizer.

    Args:
        tokenizer_type: one of :data:`TOKENIZER_TYPES`, Megatron-LM's names.
        tokenizer_model: for ``SentencePieceTokenizer`` a ``.model`` file or a folder that holds
            ``tokenizer.model``; for ``HuggingFaceTokenizer`` a local folder or a model name of the hub.
        split_special_tokens: encode text that spells a control token (``<|endoftext|>``) as ordinary text;
            otherwise it becomes that token, as in Megatron-LM.

    Raises:
        TokenizerError: unknown type, missing or damaged file, a tokenizer without an end-of-text token, or
            one that cannot split what spells its control tokens.
    """
    # imported here because transformers takes seconds to import and sentencepiece users need none of it
    if tokenizer_type == "SentencePieceTokenizer":
        from megatron_tokedit.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(tokenizer_model, split_special_tokens=split_special_tokens)
    if tokenizer_type == "HuggingFaceTokenizer":
        from megatron_tokedit.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(tokenizer_model, split_special_tokens=split_special_tokens)
    raise TokenizerError(
        f"tokenizer type {tokenizer_type!r} is not known; choose one of {', '.join(TOKENIZER_TYPES)}"
    )


def tokenizer_spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe a tokenizer for manifests: type, model (as given), vocab_size, eod, fingerprint."""
    return {
        "type": tokenizer.tokenizer_type,
        "model": tokenizer.tokenizer_model,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "fingerprint": tokenizer.fingerprint,
    }
