"""A sound configuration, and changes to it."""

from __future__ import annotations

from typing import Any

from megatron_tokedit.config.sections import RunConfig


def run_config(seq_length: int = 32, **changes: Any) -> RunConfig:
    """A sound configuration; ``section__field=value`` changes it."""
    tree: dict[str, Any] = {
        "run_dir": "runs/x",
        "tokenizer": {"type": "SentencePieceTokenizer", "model": "a.model"},
        "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": seq_length},
        "optimizer": {"lr": 1e-3},
        "training": {"train_steps": 10, "global_batch_size": 8},
        "data": {"train": [{"name": "a", "prefix": "x"}]},
    }
    for dotted, value in changes.items():
        section, field = dotted.split("__")
        tree.setdefault(section, {})[field] = value
    return RunConfig.model_validate(tree, strict=True)
