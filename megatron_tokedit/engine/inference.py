"""A trained checkpoint as a language model for scoring: hidden states in, no logits, one process.

The scoring head multiplies hidden states by ``output_weight`` in chunks, so the logits of a whole batch
never exist.
Invariant: ``hidden_states(ids) @ output_weight.T`` are the logits that training computes, and ids at or above
``vocab_size`` are padding that no one may score.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.engine import checkpoint, checkpoint_folder
from megatron_tokedit.engine.initialize import ParallelContext, current_context, initialize
from megatron_tokedit.engine.model import build_model, unwrap
from megatron_tokedit.errors import CheckpointError


class LanguageModel:
    """A built GPT model (tensor- and pipeline-parallel size 1), for forward passes only.

    Attributes:
        vocab_size: real vocabulary.
        max_context_tokens: longest input.
        model_config: the model's section.
        tokenizer_spec: what the checkpoint recorded of its tokenizer, or None.
        checkpoint: the step folder it came from.
        device: where it computes.
    """

    def __init__(
        self,
        module: Any,
        model_config: ModelConfig,
        vocab_size: int,
        device: torch.device,
        *,
        tokenizer_spec: dict[str, Any] | None = None,
        checkpoint_folder: Path | None = None,
    ) -> None:
        self._gpt = unwrap(module).eval()
        self._gpt.requires_grad_(False)
        self._gpt.post_process = (
            False  # GPTModel.forward then returns the decoder's output, final norm applied
        )
        self.model_config = model_config
        self.vocab_size = vocab_size
        self.max_context_tokens = model_config.max_positions
        self.device = device
        self.tokenizer_spec = tokenizer_spec
        self.checkpoint = checkpoint_folder
        self._fingerprint: str | None = None

    @property
    def output_weight(self) -> torch.Tensor:
        """``[padded vocabulary, hidden]`` in the model's dtype; rows from ``vocab_size`` on are padding."""
        if self._gpt.share_embeddings_and_output_weights:
            return self._gpt.embedding.word_embeddings.weight.detach()
        return self._gpt.output_layer.weight.detach()

    @property
    def dtype(self) -> torch.dtype:
        """The model's parameter dtype."""
        return self.output_weight.dtype

    @torch.inference_mode()
    def hidden_states(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm.

        Args:
            ids_BT: int64 ``[B, T]`` on :attr:`device`, ``T <= max_context_tokens``. Attention is causal:
                what is padded on the right does not change what stands before it.

        Returns:
            ``[B, T, hidden]`` in the model's dtype.
        """
        positions = torch.arange(ids_BT.size(1), device=ids_BT.device).expand_as(ids_BT)
        hidden_TBH = self._gpt(ids_BT, positions, None)
        return hidden_TBH.transpose(0, 1)

    def count_parameters(self) -> tuple[int, int, int]:
        """What a forward pass costs.

        Returns:
            All parameters; those of matrix products that a token takes part in, output layer included,
            embedding tables and experts it is not sent to left out; query heads x size of a head, summed over
            layers.
        """
        padding = (self.output_weight.size(0) - self.vocab_size) * self.output_weight.size(1)
        parameters = dict(self._gpt.named_parameters())
        tables = {
            name for name in parameters if name.startswith("embedding.") or name.startswith("output_layer.")
        }
        matrices = {name: p.numel() for name, p in parameters.items() if p.ndim >= 2 and name not in tables}
        experts = sum(size for name, size in matrices.items() if ".experts." in name)
        config = self._gpt.config
        if experts:
            experts -= experts * config.moe_router_topk // config.num_moe_experts
        return (
            sum(p.numel() for p in parameters.values()),
            sum(matrices.values()) - experts + self.output_weight.numel() - padding,
            config.num_layers * config.num_attention_heads * config.kv_channels,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over weights, dtype and architecture; padding rows are left out.

        It does not depend on the layout or the folder that the checkpoint was saved under.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(self.model_config.model_dump_json().encode())
            for name, parameter in sorted(self._gpt.named_parameters()):
                rows = (
                    self.vocab_size
                    if name.endswith(("word_embeddings.weight", "output_layer.weight"))
                    else None
                )
                data = parameter.detach()[:rows].contiguous().cpu()
                digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
                digest.update(data.view(torch.uint8).numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _inference_context(device: str) -> ParallelContext:
    """A one-process context, or the present one where a run without model parallelism is under way."""
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return initialize(
            ParallelConfig(),
            seed=0,
            device=device,
            cpu_threads=torch.get_num_threads(),  # the caller's choice: it may be one of several workers
            standalone=not dist.is_initialized(),
        )
    if parallel_state.get_model_parallel_group().size() != 1:
        raise CheckpointError(
            "a checkpoint can be loaded for scoring only where tensor and pipeline parallel sizes are 1; "
            "score in a process of its own"
        )
    return current_context()


def load_language_model(
    path: str | Path, *, device: str = "auto", precision: PrecisionConfig | str | None = None
) -> LanguageModel:
    """Load a checkpoint, saved under any layout, for scoring in this process.

    Args:
        path: a step folder, a run folder, or its ``checkpoints`` folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: recipe to compute in, or its name; default: the one it was trained with.

    Raises:
        CheckpointError: no complete checkpoint, or one that does not record its model.
        ConfigError: a device that is not there.
    """
    folder = checkpoint_folder.require(path)
    run_config = checkpoint_folder.read_json(folder, checkpoint_folder.RUN_CONFIG_FILE)
    state = checkpoint_folder.read_json(folder, checkpoint_folder.STATE_FILE)
    for name, content, key in (
        (checkpoint_folder.RUN_CONFIG_FILE, run_config, "model"),
        (checkpoint_folder.STATE_FILE, state, "vocab_size"),
    ):
        if key not in content:
            raise CheckpointError(
                f"{folder / name}: has no {key!r}; it was not written by this package's training"
            )
    model_config = ModelConfig.model_validate(run_config["model"])
    if isinstance(precision, str):
        precision = PrecisionConfig.model_validate({"recipe": precision})
    precision = precision or PrecisionConfig.model_validate(run_config.get("precision", {}))
    ctx = _inference_context(device)
    model = build_model(
        model_config,
        precision,
        ctx,
        state["vocab_size"],
        parallel=ParallelConfig(),
        wrap_with_ddp=False,
        perform_initialization=False,
    )
    checkpoint.load(folder, model=model, optimizer=None, scheduler=None, ctx=ctx)
    return LanguageModel(
        model[0],
        model_config,
        state["vocab_size"],
        ctx.device,
        tokenizer_spec=state.get("tokenizer"),
        checkpoint_folder=folder,
    )
