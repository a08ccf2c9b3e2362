"""Tiny models and tokenizers that are real: a few layers, random weights, files as on disk everywhere else.

Invariant: deterministic for given arguments, made in well under a second, no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_tokedit.config.sections import ModelConfig


def tiny_llama(**changes: Any) -> ModelConfig:
    """A Llama-style model with grouped key/value heads: 4 layers, hidden size 32."""
    fields: dict[str, Any] = {
        "family": "llama",
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "seq_length": 32,
        "make_vocab_size_divisible_by": 16,
    }
    return ModelConfig(**{**fields, **changes})


def tiny_gpt2(**changes: Any) -> ModelConfig:
    """A GPT-2-style model: 4 layers, hidden size 32, tied embeddings, learned positions."""
    fields: dict[str, Any] = {
        "family": "gpt2",
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 32,
        "make_vocab_size_divisible_by": 16,
    }
    return ModelConfig(**{**fields, **changes})


def tiny_model(family: str, **changes: Any) -> ModelConfig:
    """A model of any family: :func:`tiny_gpt2`, or the sizes of :func:`tiny_llama` (4 experts)."""
    if family == "gpt2":
        return tiny_gpt2(**changes)
    experts = {"num_moe_experts": 4} if family == "mixtral" else {}
    return tiny_llama(family=family, **{**experts, **changes})


def random_batches(
    vocab_size: int,
    *,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Endless microbatches of random tokens, as megatron-core's ``GPTDataset`` shapes them, about a tenth
    masked.

    ``num_microbatches`` is counted over all data-parallel ranks: the same global batches whatever
    ``dp_size`` is.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in range(num_microbatches):
            shape = (micro_batch_size, seq_length + 1)
            tokens = torch.randint(0, vocab_size, shape, generator=generator)
            loss_mask = (torch.rand(micro_batch_size, seq_length, generator=generator) > 0.1).float()
            if index % dp_size == dp_rank:
                yield {
                    "tokens": tokens[:, :-1].contiguous(),
                    "labels": tokens[:, 1:].contiguous(),
                    "loss_mask": loss_mask,
                    "position_ids": torch.arange(seq_length).repeat(micro_batch_size, 1),
                }


def write_hf_llama(folder: str | Path, *, vocab_size: int, seed: int = 0, **changes: Any) -> Path:
    """Write a Hugging Face Llama folder with random weights (no tokenizer)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).save_pretrained(folder)
    return Path(folder)


def write_hf_gpt2(folder: str | Path, *, vocab_size: int, seed: int = 0, **changes: Any) -> Path:
    """Write a Hugging Face GPT-2 folder with random weights (no tokenizer)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        GPT2LMHeadModel(GPT2Config(**{**fields, **changes})).save_pretrained(folder)
    return Path(folder)


def train_sentencepiece(path: str | Path, texts: Sequence[str], *, vocab_size: int = 400) -> Path:
    """Train a BPE sentencepiece model with byte fallback on ``texts``; ``path`` is a ``*.model`` file."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    Path(path).write_bytes(model.getvalue())
    return Path(path)
