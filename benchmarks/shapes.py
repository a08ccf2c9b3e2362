"""Model shapes of the benchmarks, under the names of ``--shape``; weights are random.

Invariant: one shape is the same model for this package and for Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_tokedit.config.model import ModelConfig
from megatron_tokedit.engine.sizes import flops_per_token


@dataclass(frozen=True, slots=True)
class Shape:
    """A model.

    Attributes:
        name: of the table below.
        model: for this package.
        vocab_size: real vocabulary.
        words: what it looks like.
    """

    name: str
    model: ModelConfig
    vocab_size: int
    words: str

    def with_layers(self, num_layers: int) -> Shape:
        """The shape with so many layers, and words that say so."""
        if num_layers == self.model.num_layers:
            return self
        model = self.model.model_copy(update={"num_layers": num_layers})
        return Shape(self.name, model, self.vocab_size, f"{self.words}, of which {num_layers} layers")


def _llama(name: str, words: str, vocab_size: int, **fields: Any) -> Shape:
    return Shape(name, ModelConfig(family="llama", **fields), vocab_size, words)


SHAPES = {
    shape.name: shape
    for shape in (
        _llama(
            "quickstart", "Llama 4 x 192", 2048,
            num_layers=4, hidden_size=192, num_attention_heads=6, seq_length=512,
        ),
        Shape(
            "124m",
            ModelConfig(
                family="gpt2", num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024
            ),
            50257,
            "GPT-2 12 x 768",
        ),
        _llama(
            "1b", "Llama-3.2-1B, 16 x 2048", 128256,
            num_layers=16, hidden_size=2048, num_attention_heads=32, num_query_groups=8,
            ffn_hidden_size=8192, seq_length=4096, rotary_base=500000,
            share_embeddings_and_output_weights=True,
        ),
        _llama(
            "3b", "Llama-3.2-3B, 28 x 3072", 128256,
            num_layers=28, hidden_size=3072, num_attention_heads=24, num_query_groups=8,
            ffn_hidden_size=8192, seq_length=4096, rotary_base=500000,
            share_embeddings_and_output_weights=True,
        ),
        _llama(
            "8b", "Llama-3.1-8B, 32 x 4096", 128256,
            num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8,
            ffn_hidden_size=14336, seq_length=4096, rotary_base=500000,
        ),
    )
}  # fmt: skip
"""Name -> shape."""


def shape_named(name: str, num_layers: int | None = None) -> Shape:
    """A shape of the table, with another number of layers where asked."""
    shape = SHAPES[name]
    return shape if num_layers is None else shape.with_layers(num_layers)


def forward_flops(shape: Shape, lengths: Iterable[int]) -> float:
    """Operations of scoring documents of these lengths, each in one window without a start id.

    The last token of a document is only looked at; what counts is in ``engine.sizes.flops_per_token``.
    """
    return sum(
        (length - 1) * flops_per_token(shape.model, shape.vocab_size, length - 1) / 3 for length in lengths
    )


def layers_that_fit(shape: Shape, usable_bytes: float, needed_bytes: Callable[[ModelConfig], float]) -> int:
    """Layers of a shape whose training fits in memory; 0 where not even one does.

    Args:
        shape: of the table.
        usable_bytes: of memory.
        needed_bytes: of a model with its optimizer and activations; grows with the layers.
    """
    numbers = range(1, shape.model.num_layers + 1)
    models = (shape.model.model_copy(update={"num_layers": number}) for number in numbers)
    return sum(needed_bytes(model) <= usable_bytes for model in models)


def hf_config(shape: Shape) -> Any:
    """The same model as Hugging Face's configuration."""
    from megatron_tokedit.conversion.settings import hugging_face_config

    last = shape.vocab_size - 1
    return hugging_face_config(
        shape.model,
        shape.vocab_size,
        token_ids={"bos_token_id": last, "eos_token_id": last},
        attn_implementation="sdpa",
        use_cache=False,
    )


def hf_model(shape: Shape, *, dtype: Any = None) -> Any:
    """The model with random weights, on torch's default device."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_config(hf_config(shape), **({} if dtype is None else {"dtype": dtype}))
