"""Whether a checkpoint may go on under the present configuration.

Invariant: what would make the checkpoint's weights or its position in the data mean something else is
refused, with each difference spelled out; what merely changes the course of the run is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tokedit.config.base import Section
from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.record import differences
from megatron_tokedit.config.sections import ModelConfig, PrecisionConfig, SftConfig
from megatron_tokedit.errors import CheckpointError

_FREE_MODEL_FIELDS = (
    "hidden_dropout", "attention_dropout", "init_method_std", "moe_aux_loss_coeff", "moe_z_loss_coeff",
)  # fmt: skip
"""Model settings that do not touch the shape or the meaning of the weights."""
_CONTINUABLE_MODEL_FIELDS = (
    "seq_length", "max_position_embeddings", "rotary_base", "rope_scaling", "rope_scaling_factor",
    "seq_len_interpolation_factor",
)  # fmt: skip
"""Settings that a continuation may give a model with rotary positions, to teach it longer texts."""


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
        CheckpointError: the model or the tokenizer differ, or one run is in float32 and the other in bfloat16
            (with or without FP8: between those a run may go either way).
    """
    old, new = _weights_settings(recorded_config), _weights_settings(config)
    if _compute_dtype(recorded_config) == _compute_dtype(config):
        del old["precision"], new["precision"]
    fatal = differences(old, new)
    fatal += _tokenizer_differences(recorded_tokenizer, tokenizer)
    fatal += differences(_rows_settings(recorded_config), _rows_settings(config))
    _refuse(folder, fatal, "resumed", "start a new run by giving another run_dir")
    changed = _precision_differences(recorded_config, config)
    return changed + differences(_course(recorded_config), _course(config))


def check_continuable(
    folder: str,
    *,
    recorded_config: Mapping[str, Any],
    config: Mapping[str, Any],
    recorded_tokenizer: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
) -> list[str]:
    """Compare another run's checkpoint with the run of stage ``continue`` or ``sft`` that starts from it.

    Arguments, result and errors as of :func:`check_resumable`. Data, schedule and batches are the new run's
    own; the precision may differ (as on resuming, where the optimizer is kept); so may length and scaling of
    rotary positions.
    """
    old, new = _weights_settings(recorded_config), _weights_settings(config)
    free: set[str] = set()
    if config["model"].get("family") != "gpt2":
        free = set(_CONTINUABLE_MODEL_FIELDS)
    same_dtype = _compute_dtype(recorded_config) == _compute_dtype(config)
    if same_dtype or config["init_from"]["optimizer"] == "fresh":
        old, new = {"model": old["model"]}, {"model": new["model"]}
    changed_model = [{k: v for k, v in side["model"].items() if k in free} for side in (old, new)]
    for side in (old, new):
        side["model"] = {key: value for key, value in side["model"].items() if key not in free}
    fatal = differences(old, new) + _tokenizer_differences(recorded_tokenizer, tokenizer)
    _refuse(folder, fatal, "continued", "give another checkpoint in init_from.checkpoint")
    changed = differences(changed_model[0], changed_model[1], "model.")
    return changed + _precision_differences(recorded_config, config)


def _rows_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the samples of a run are made by: its count of them means nothing in others."""
    if config.get("stage") != "sft":
        return {"stage": "not sft"}
    return {"stage": "sft", "sft": _with_defaults(SftConfig, config.get("sft", {}))}


def _tokenizer_differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Where the tokenizer lies may change, what it does may not."""
    ids = ("type", "vocab_size", "eod", "fingerprint")
    return differences(
        {key: recorded.get(key) for key in ids}, {key: current.get(key) for key in ids}, "tokenizer."
    )


def _refuse(folder: str, fatal: list[str], what: str, instead: str) -> None:
    if fatal:
        listed = "\n  - ".join(["", *fatal])
        raise CheckpointError(
            f"{folder} cannot be {what} under this configuration:{listed}\n"
            f"  Put the settings back, or {instead}."
        )


def _course(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that change what follows; of the data those that ``resume_blend`` does not speak of."""
    settings = {key: config.get(key) for key in ("seed", "optimizer", "schedule", "training")}
    masks = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
    return {**settings, "data": {key: config["data"].get(key) for key in masks}}


def _weights_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the weights, the optimizer state and the samples depend on.

    What an older record does not name had the default.
    """
    model = _with_defaults(ModelConfig, config.get("model", {}))
    kept = {key: value for key, value in model.items() if key not in _FREE_MODEL_FIELDS}
    recipe = _with_defaults(PrecisionConfig, config.get("precision", {}))["recipe"]
    return {"model": kept, "precision": {"recipe": recipe}}


def _precision_differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """How matrix products are computed may change; the optimizer's exact parameters stay what they are."""
    old, new = (_with_defaults(PrecisionConfig, side.get("precision", {})) for side in (recorded, current))
    return differences(old, new, "precision.")


def _compute_dtype(config: Mapping[str, Any]) -> str:
    precision = _with_defaults(PrecisionConfig, config.get("precision", {}))
    recipe = RECIPES.get(precision["recipe"])
    return recipe.compute_dtype if recipe else str(precision["recipe"])


def _with_defaults(section: type[Section], recorded: Mapping[str, Any]) -> dict[str, Any]:
    fields = section.model_fields.items()
    return {name: field.default for name, field in fields if not field.is_required()} | dict(recorded)
