"""A Hugging Face causal language model folder as a backbone.

The hidden states come from the base model and the head is applied in chunks, so what stands between them in
the model's own ``forward`` (a bias, a scale, a soft cap) has to be known here, and on a CPU the layers are
replaced by faster ones (``huggingface_layers``). That all this fits is not assumed: at load,
log-probabilities are compared on a sample with those of the model as transformers built it, and so is a
padded row with an unpadded one (a model that looks ahead would differ).

Invariant: a model whose own logits the chunked head does not reproduce is refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_tokedit.errors import PriorError
from megatron_tokedit.scoring.head import OutputHead
from megatron_tokedit.scoring.huggingface_layers import speed_up
from megatron_tokedit.scoring.identity import UNLIMITED_TOKENS
from megatron_tokedit.scoring.scorer import ModelSize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
_SAMPLE_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of log-probabilities that rounding may explain in the check at load."""


class HuggingFaceBackbone:
    """A causal language model loaded with ``AutoModelForCausalLM``; see :class:`Backbone` for the members.

    Args:
        path: model folder.
        fingerprint: of the folder's files.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: where it runs.

    Raises:
        PriorError: the folder cannot be loaded, lacks weights, or the chunked head does not fit the model.
    """

    def __init__(self, path: str, *, fingerprint: str, dtype: str, device: torch.device) -> None:
        self.device = device
        self.fingerprint = hashlib.sha256(f"{fingerprint} {dtype}".encode()).hexdigest()
        self.model = _load_model(path, DTYPES[dtype]).to(device).eval().requires_grad_(False)
        """transformers' model, but for what is faster now."""
        config = self.model.config
        self.max_context_tokens = context_limit(config)
        self._base = self.model.base_model
        self.head = _find_head(path, self.model)
        self.size = _model_size(self.model)
        sample_1L = self._sample()
        own_LV = self._own_logprobs(sample_1L)
        speed_up(self.model)
        self._check(path, sample_1L, own_LV)

    def hidden_states(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Final hidden states ``[B, L, H]``. No attention mask: rows are padded on the right only."""
        hidden_BLH: torch.Tensor = self._base(input_ids=ids_BL, use_cache=False).last_hidden_state
        return hidden_BLH

    def _sample(self) -> torch.Tensor:
        """A few random ids, int64 ``[1, L]``."""
        length = min(_SAMPLE_TOKENS, self.max_context_tokens)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.head.vocab_size, (1, length), generator=generator).to(self.device)

    @torch.inference_mode()
    def _own_logprobs(self, ids_1L: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``[L, V]`` from the model's own ``forward``."""
        logits_LV: torch.Tensor = self.model(input_ids=ids_1L, use_cache=False).logits[0]
        return logits_LV[:, : self.head.vocab_size].float().log_softmax(-1)

    @torch.inference_mode()
    def _check(self, path: str, ids_1L: torch.Tensor, own_LV: torch.Tensor) -> None:
        """Compare the chunked head with the model's own answer, and a padded row with an unpadded one."""
        logits_LV = self.head.logits(self.hidden_states(ids_1L)[0])
        if not (logits_LV.isfinite().all() and own_LV.isfinite().all()):
            raise PriorError(
                f"{path}: log-probabilities of a sample are not finite numbers; the weights are damaged, or "
                "the precision does not suffice (try --prior-dtype float32)"
            )
        ours_LV = logits_LV.log_softmax(-1)
        dtype = self.head.weight_VH.dtype
        rounding = 4 * torch.finfo(dtype).eps * logits_LV.abs().max().item()
        tolerance = max(_TOLERANCE[dtype], rounding)
        difference = (own_LV - ours_LV).abs().max().item()
        if not difference <= tolerance:
            raise PriorError(
                f"{path}: log-probabilities from the chunked head differ by {difference:.3g} from those of "
                f"{type(self.model).__name__} itself; this architecture's head is not supported"
            )
        half = ids_1L.shape[1] // 2
        half_LV = self.head.logits(self.hidden_states(ids_1L[:, :half])[0]).log_softmax(-1)
        difference = (half_LV - ours_LV[:half]).abs().max().item()
        if not difference <= tolerance:
            raise PriorError(
                f"{path}: what follows a token changes its log-probability by {difference:.3g} "
                f"({type(self.model).__name__}); a prior must be a causal language model"
            )


def load_config(path: str) -> Any:
    """The folder's transformers configuration.

    Raises:
        PriorError: there is none, or it is damaged or of an unknown architecture.
    """
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PriorError(f"{path}: not a usable Hugging Face model folder: {_first_line(error)}") from error


def context_limit(config: Any) -> int:
    """Longest input in tokens that a model's configuration states; 2**30 where it states none."""
    for key in _CONTEXT_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return UNLIMITED_TOKENS


def weight_files(path: str) -> list[Path]:
    """Files that determine the scores: the configuration and the weights.

    Raises:
        PriorError: the folder holds no weights.
    """
    folder = Path(path)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise PriorError(f"{path}: no weights (*.safetensors or pytorch_model*.bin) in this model folder")
    return [folder / "config.json", *weights]


def _load_model(path: str, dtype: torch.dtype) -> Any:
    """The model with every weight taken from the folder."""
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise PriorError(f"{path}: the prior cannot be loaded: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise PriorError(
            f"{path}: {len(missing)} weights are missing from the folder, the first is {missing[0]}; "
            "they would be random, so this prior is refused"
        )
    return model


def _find_head(path: str, model: Any) -> OutputHead:
    """The output layer, and what the model's ``forward`` does to its logits."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise PriorError(
            f"{path}: {type(model).__name__} has no linear output layer; expected a causal language model"
        )
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return OutputHead(
        weight_VH=layer.weight,
        bias_V=layer.bias,
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma
    )


def _model_size(model: Any) -> ModelSize:
    """Count the parameters, before layers are replaced."""
    head = model.get_output_embeddings().weight
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = [
        parameter
        for parameter in model.parameters()
        if parameter.ndim >= 2 and id(parameter) not in tables and parameter is not head
    ]
    config = model.config
    num_heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_matmul_parameters=sum(matrix.numel() for matrix in matrices) + head.numel(),
        attention_width=config.num_hidden_layers * num_heads * head_size,
    )


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, with its type where the message is short of words."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
