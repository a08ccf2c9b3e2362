"""Sizes at the edges of what FP8 products take, and what the configuration's own checks say of them.

Invariant: a size is either refused before a run starts, with a sentence that names the field, or it trains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig, TrainingConfig
from megatron_tokedit.config.validate import cross_section_faults

_MODEL = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 512,
    "seq_length": 256,
}


@dataclass(frozen=True, slots=True)
class EdgeCase:
    """A size.

    Attributes:
        name: of the case.
        in_fp8: whether FP8 recipes take it; ``either``: as the checks say, which the machine then tests.
        changes: fields of the model.
        micro_batch_size: sequences.
        vocab_size: real vocabulary.
    """

    name: str
    in_fp8: Literal["runs", "refused", "either"]
    changes: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 1
    vocab_size: int = 1000

    @property
    def model(self) -> dict[str, Any]:
        """All fields of the model."""
        return {**_MODEL, **self.changes, "vocab_size": self.vocab_size}

    def faults(self, recipe: str) -> list[Fault]:
        """What the configuration's checks say under a recipe."""
        sections = {
            "model": ModelConfig.model_validate(self.model),
            "parallel": ParallelConfig(),
            "precision": PrecisionConfig.model_validate({"recipe": recipe}),
            "training": TrainingConfig(
                train_steps=2,
                micro_batch_size=self.micro_batch_size,
                global_batch_size=self.micro_batch_size,
            ),
        }
        return cross_section_faults(sections, world_size=1)

    def for_job(self) -> dict[str, Any]:
        """As ``layer_jobs.train_at_edges`` takes it."""
        return {
            "name": self.name,
            "model": self.model,
            "micro_batch_size": self.micro_batch_size,
            "vocab_size": self.vocab_size,
        }


EDGE_CASES = (
    EdgeCase("sequence 256", "runs"),
    EdgeCase("sequence 4096", "runs", {"seq_length": 4096}),
    EdgeCase("sequence 32, one row", "runs", {"seq_length": 32}),
    EdgeCase("sequence 24, four rows: 96 tokens", "runs", {"seq_length": 24}, micro_batch_size=4),
    EdgeCase("sequence 136: 8 over a multiple of 16", "either", {"seq_length": 136}),
    EdgeCase("sequence 8, one row", "either", {"seq_length": 8}),
    EdgeCase("sequence 100: 4 over a multiple of 16", "refused", {"seq_length": 100}),
    EdgeCase("sequence 127", "refused", {"seq_length": 127}),
    EdgeCase("MLP of 520: 8 over a multiple of 16", "refused", {"ffn_hidden_size": 520}),
    EdgeCase("hidden size 264: 8 over a multiple of 16", "refused", {"hidden_size": 264, "kv_channels": 64}),
    EdgeCase("vocabulary 50257", "runs", vocab_size=50257),
    EdgeCase("vocabulary 1, padded to 128", "runs", vocab_size=1),
    EdgeCase("vocabulary 1001, not padded", "either", {"make_vocab_size_divisible_by": 1}, vocab_size=1001),
)
