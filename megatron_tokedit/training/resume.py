"""Whether a checkpoint may go on under the present configuration.

Invariant: what would make the checkpoint's weights or its position in the data mean something else is
refused, with each difference spelled out; what merely changes the course of the run is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tokedit.config.record import differences
from megatron_tokedit.errors import CheckpointError

_FREE_MODEL_FIELDS = ("hidden_dropout", "attention_dropout", "init_method_std")
"""Model settings that do not touch the shape or the meaning of the weights."""


def check_resumable(
    folder: str,
    *,
    recorded_config: Mapping[str, Any],
    config: Mapping[str, Any],
    recorded_tokenizer: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
) -> list[str]:
    """Compare a checkpoint with the run that wants to resume it.

    Args:
        folder: the checkpoint, for messages.
        recorded_config: resolved configuration in the checkpoint.
        config: resolved configuration of this run.
        recorded_tokenizer: tokenizer spec in the checkpoint.
        tokenizer: tokenizer spec of this run.

    Returns:
        Differences that are allowed but change what follows, one line each.

    Raises:
        CheckpointError: the model, the precision or the tokenizer differ.
    """
    fatal = differences(_weights_settings(recorded_config), _weights_settings(config))
    # where the tokenizer lies may change, what it does may not
    ids = ("type", "vocab_size", "eod", "fingerprint")
    fatal += differences(
        {key: recorded_tokenizer.get(key) for key in ids},
        {key: tokenizer.get(key) for key in ids},
        "tokenizer.",
    )
    if fatal:
        listed = "\n  - ".join(["", *fatal])
        raise CheckpointError(
            f"{folder} cannot be resumed under this configuration:{listed}\n"
            f"  Put the settings back, or start a new run by giving another run_dir."
        )
    notable = ("seed", "optimizer", "schedule", "training", "data")
    changes = differences(
        {key: recorded_config.get(key) for key in notable}, {key: config.get(key) for key in notable}
    )
    if _sample_order(recorded_config) != _sample_order(config):
        changes.append("the order of the training samples may change: some may be repeated or left out")
    return changes


def _sample_order(config: Mapping[str, Any]) -> list[Any]:
    """What decides which sample comes when."""
    training = config["training"]
    sources = [(source["prefix"], source["weight"]) for source in config["data"]["train"]]
    return [config["seed"], training["train_steps"] * training["global_batch_size"], sources]


def _weights_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the weights, the optimizer state and the samples depend on."""
    model = {key: value for key, value in config.get("model", {}).items() if key not in _FREE_MODEL_FIELDS}
    return {"model": model, "precision": config.get("precision")}
