"""Names that megatron-core 0.16.1 uses without Transformer Engine, but defines only with it.

Without them routers of experts and recomputed norms end in a ``NameError``, on any device. Invariant: only
names that are missing are added, and each says what a machine without Transformer Engine means.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any


class NoFp8:
    """Stands for Transformer Engine's ``FP8GlobalStateManager`` where FP8 is never on."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Never."""
        return False


def _no_context(*args: object, **kwargs: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


_MISSING: dict[str, dict[str, Any]] = {
    "megatron.core.tensor_parallel.random": {
        "FP8GlobalStateManager": NoFp8,
        "activation_recompute_forward": _no_context,
        "fp8_autocast": _no_context,
    },
    "megatron.core.transformer.moe.moe_utils": {"te_general_gemm": None},
}


def install() -> None:
    """Add what is missing; may be called any number of times."""
    for name, values in _MISSING.items():
        module = importlib.import_module(name)
        for key, value in values.items():
            if not hasattr(module, key):
                setattr(module, key, value)
