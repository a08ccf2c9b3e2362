"""lm-eval's own model ``hf`` over a Hugging Face folder, to compare with.

Invariant: the weights, the precision, the context and the start of a document are those of the same options
for this project's own way; all else is lm-eval's.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tokedit.errors import ConfigError, PriorError, first_line
from megatron_tokedit.evaluation.tasks.model import ModelOptions
from megatron_tokedit.scoring.load import resolve_device

_DTYPES = ("float32", "bfloat16", "float16")
_TYPICAL_TOKENS = 512
"""A row that is as long as the batch size, in rows, is made for."""


def load_lm_eval_model(path: str, options: ModelOptions) -> Any:
    """Load it.

    Raises:
        ConfigError: options that it does not have, or a package that it needs is missing.
        PriorError: the folder cannot be loaded.
    """
    if options.dtype not in _DTYPES:
        raise ConfigError(f"--backend lm-eval: dtype {options.dtype}, expected {' or '.join(_DTYPES)}")
    if options.tokenizer_type or options.tokenizer_model:
        raise ConfigError("--backend lm-eval: takes the folder's own tokenizer; leave --tokenizer-... out")
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(
            f"--backend lm-eval: lm-eval's model hf needs {error.name}; install it: pip install -e '.[eval]'"
        ) from error
    device = resolve_device(options.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, options.dtype), local_files_only=True
        )
    except Exception as error:  # transformers raises bare Exceptions of many kinds for damaged folders
        raise PriorError(f"{path}: cannot be loaded: {first_line(error)}") from error
    return HFLM(
        pretrained=model.to(device),
        tokenizer=tokenizer,
        max_length=options.context,
        batch_size=max(1, options.batch_tokens // (options.context or _TYPICAL_TOKENS)),
        add_bos_token={"auto": None, "always": True, "never": False}[options.document_start],
    )
