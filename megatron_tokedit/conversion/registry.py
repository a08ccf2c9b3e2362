"""The architectures that are converted, by the name in ``config.json`` and by family."""

from __future__ import annotations

from megatron_tokedit.config.families import FamilyName
from megatron_tokedit.conversion.architecture import Architecture
from megatron_tokedit.conversion.gpt2 import GPT2
from megatron_tokedit.conversion.llama import LLAMA
from megatron_tokedit.conversion.mixtral import MIXTRAL
from megatron_tokedit.conversion.olmo import OLMO
from megatron_tokedit.conversion.qwen2 import QWEN2
from megatron_tokedit.conversion.qwen3 import QWEN3
from megatron_tokedit.errors import CheckpointError

ARCHITECTURES: dict[FamilyName, Architecture] = {
    architecture.family: architecture for architecture in (LLAMA, GPT2, QWEN2, QWEN3, OLMO, MIXTRAL)
}
_BY_MODEL_TYPE = {name: found for found in ARCHITECTURES.values() for name in found.model_types}
_HINTS = {
    "hf_olmo": "its transformers version is published beside it (allenai/OLMo-1B-hf): convert that",
    "olmo2": "OLMo 2 puts its norms behind attention and MLP",
    "olmo3": "OLMo 3 puts its norms behind attention and MLP, and has sliding windows",
    "qwen2_moe": "it has shared experts",
    "qwen3_moe": "its experts differ from Mixtral's",
    "phi3": "its fused weights and partial rotary positions have no family here",
    "gemma": "its norms and embedding scale have no family here",
    "gemma2": "its norms, soft caps and sliding windows have no family here",
    "gpt_neox": "its parallel attention and partial rotary positions have no family here",
}


def architecture_of(model_type: object, where: str) -> Architecture:
    """The architecture of a ``config.json``.

    Args:
        model_type: its ``model_type``.
        where: the file, for messages.

    Raises:
        CheckpointError: it is not among those that are converted.
    """
    found = _BY_MODEL_TYPE.get(str(model_type))
    if found is not None:
        return found
    hint = f" ({_HINTS[str(model_type)]})" if model_type in _HINTS else ""
    raise CheckpointError(
        f"{where}: model_type {model_type!r} is not known{hint}; converted are {', '.join(_BY_MODEL_TYPE)}"
    )
