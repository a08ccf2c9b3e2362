"""``config.json`` <-> the model section.

Invariant: a setting that would change what the model computes is either carried over or a fault with its
name; a model section that comes back from ``config.json`` is the one that went in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_tokedit.config.model import ModelConfig, ParallelConfig
from megatron_tokedit.config.validate import cross_section_faults
from megatron_tokedit.conversion.architecture import Architecture
from megatron_tokedit.conversion.registry import ARCHITECTURES
from megatron_tokedit.conversion.rope import read_rope, rope_faults, write_rope
from megatron_tokedit.errors import CheckpointError


def refuse(where: object, what: str, faults: list[str]) -> None:
    """Raise one error that lists all faults; do nothing where there are none.

    Raises:
        CheckpointError: ``faults`` is not empty.
    """
    if faults:
        count = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
        raise CheckpointError("\n  - ".join([f"{where}: {what}: {count}", *faults]))


def read_settings(
    architecture: Architecture, config: Any, *, seq_length: int | None
) -> tuple[ModelConfig | None, list[str]]:
    """The model section of a published model.

    Args:
        architecture: of the model.
        config: transformers' configuration, which has the defaults filled in.
        seq_length: longest text the model will see; default: what it was made for.

    Returns:
        The section, None where there are faults, and the faults.
    """
    faults = [
        f"{name}: {_shown(getattr(config, name))} is not computed here, expected "
        f"{' or '.join(_shown(value) for value in values)}"
        for name, values in architecture.computed.items()
        if getattr(config, name, values[0]) not in values
    ]
    fields: dict[str, Any] = {"family": architecture.family, "vocab_size": config.vocab_size}
    fields |= dict(architecture.ours_computed)
    for theirs, ours in architecture.fields.items():
        value = getattr(config, theirs, None)
        if ours in fields and fields[ours] != value:
            faults.append(f"{theirs}: {_shown(value)}, expected the same as another dropout, {fields[ours]}")
        fields[ours] = value
    if architecture.head_size_name:
        fields["kv_channels"] = getattr(config, architecture.head_size_name, None)
    positions, more = _positions(config, fields["max_position_embeddings"], seq_length)
    fields |= positions
    faults += more
    if architecture.uses_rope:
        rope, more = read_rope(getattr(config, "rope_parameters", None) or {})
        fields |= rope
        faults += more
    try:
        model = ModelConfig.model_validate(fields).resolved()
    except ValidationError as error:
        return None, [*faults, *(f"{e['loc'][0]}: {e['msg']}, got {e['input']!r}" for e in error.errors())]
    faults += [str(fault) for fault in cross_section_faults({"model": model})]
    return (None if faults else model), faults


def _positions(config: Any, limit: int, seq_length: int | None) -> tuple[dict[str, int], list[str]]:
    """Lengths, with a sliding window that must not be noticed."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    length = seq_length or limit
    if length > limit:
        return {"seq_length": length}, [f"--seq-length {length}: the model has {limit} positions"]
    if window is None or window >= limit:
        return {"seq_length": length}, []
    if length > window:
        return {"seq_length": length}, [
            f"sliding_window: {window} tokens, fewer than the {length} of a text; attention here has no "
            f"window: give --seq-length {window} or less to convert the model for texts in which the window "
            "makes no difference"
        ]
    return {"seq_length": length, "max_position_embeddings": length}, []


def layout_faults(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """What keeps a model from being split so."""
    own = {str(fault) for fault in cross_section_faults({"model": model})}
    faults = [str(fault) for fault in cross_section_faults({"model": model, "parallel": parallel})]
    return [fault for fault in faults if fault not in own]


def hugging_face_faults(model: ModelConfig) -> list[str]:
    """What of a model section the published code of its family does not compute."""
    architecture = ARCHITECTURES[model.family]
    faults = [
        f"model.{name}: {getattr(model, name)}; published models of family {model.family} have {value}"
        for name, value in architecture.ours_computed.items()
        if getattr(model, name) != value
    ]
    return faults + architecture.check(model) + rope_faults(model)


def hugging_face_config(
    model: ModelConfig, vocab_size: int, *, token_ids: Mapping[str, Any] | None = None, **more: Any
) -> Any:
    """The configuration that transformers has of a model section.

    Args:
        model: the model.
        vocab_size: real vocabulary.
        token_ids: ``bos_token_id`` and so on; default: none.
        more: further settings, such as ``dtype``.

    Raises:
        CheckpointError: the published code of the family does not compute this model.
    """
    from transformers import CONFIG_MAPPING

    refuse(f"family {model.family}", "no Hugging Face model computes this", hugging_face_faults(model))
    architecture, resolved = ARCHITECTURES[model.family], model.resolved(vocab_size)
    fields = {theirs: getattr(resolved, ours) for theirs, ours in architecture.fields.items()}
    fields |= {name: values[0] for name, values in architecture.computed.items()}
    if architecture.head_size_name and (
        architecture.states_head_size or model.head_size * model.num_attention_heads != model.hidden_size
    ):
        fields[architecture.head_size_name] = model.head_size
    if architecture.uses_rope:
        fields["rope_parameters"] = write_rope(model)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | dict(token_ids or {})
    config_class = CONFIG_MAPPING[architecture.model_types[0]]
    try:
        return config_class(
            vocab_size=vocab_size,
            architectures=[architecture.class_name],
            **{**fields, **ids, **more},
        )
    except Exception as error:  # transformers' own checks, such as of heads that do not divide the width
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"family {model.family}: no Hugging Face model computes this: {reason[:500]}"
        ) from error


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
