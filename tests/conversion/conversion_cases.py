"""Tiny published models with tokenizers, and conversions of them, for the ranks of the pool."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "data"
VOCAB_SIZE = 301  # odd; padded to 384
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": 64, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gpt2": ("GPT2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt2-untied": ("GPT2", {"tie_word_embeddings": False, "n_inner": 48}),
    "olmo": ("Olmo", {"pad_token_id": 1}),
    "olmo-tied": ("Olmo", {"pad_token_id": 1, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
}


def write_published(folder: Path, name: str, *, dtype: str = "float32", **changes: Any) -> Path:
    """A model with random weights, as transformers itself saves it, with a tokenizer of 300 ids."""
    import torch
    import transformers

    kind, fields = PUBLISHED[name]
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if kind == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    ids = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = getattr(transformers, f"{kind}Config")(
            **{**sizes, "tie_word_embeddings": kind == "GPT2", **ids, **fields, **changes}
        )
        head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
        model = getattr(transformers, f"{kind}{head}")(config)
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key or "ln_" in key:
                torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for file in (DATA / "tiny_byte_level_bpe").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def convert(*arguments: Any) -> tuple[int, str]:
    """Run the command in this process; its exit code, and what it wrote to stderr."""
    from megatron_tokedit.cli.convert_checkpoint import main

    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        code = main([str(argument) for argument in arguments])
    for handler in list(logging.getLogger("megatron_tokedit").handlers):
        logging.getLogger("megatron_tokedit").removeHandler(handler)
    return code, shown.getvalue()


def convert_all(calls: list[tuple[Any, ...]]) -> list[tuple[int, str]]:
    """:func:`convert` of every list of arguments, in one process."""
    return [convert(*arguments) for arguments in calls]


def published_logits(folder: Path, ids: Any) -> tuple[Any, list[str]]:
    """Logits of a folder through AutoModelForCausalLM, and what transformers warned of."""
    import torch
    import transformers

    warnings: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    keeper = Keeper(logging.WARNING)
    logging.getLogger("transformers").addHandler(keeper)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype="auto"
        )
        transformers.AutoTokenizer.from_pretrained(folder)
        transformers.GenerationConfig.from_pretrained(folder)
    finally:
        logging.getLogger("transformers").removeHandler(keeper)
    warnings += [f"{kind}: {names}" for kind, names in info.items() if names]
    with torch.no_grad():
        return model.eval()(ids).logits, warnings


def our_logits(folder: Path, ids: Any) -> Any:
    """Logits of a checkpoint through the engine, of the real vocabulary."""
    from megatron_tokedit.engine.inference import load_language_model

    model = load_language_model(folder, device="cpu")
    return model.hidden_states(ids) @ model.output_weight[: model.vocab_size].T


def some_ids(vocab_size: int = VOCAB_SIZE) -> Any:
    import torch

    return torch.randint(0, vocab_size, (3, 32), generator=torch.Generator().manual_seed(1))


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
