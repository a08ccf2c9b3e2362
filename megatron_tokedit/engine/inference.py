"""A trained checkpoint as a language model for scoring: hidden states in, no logits, one process.

The scoring head multiplies hidden states by ``output_weight`` in chunks, so the logits of a whole batch
never exist. Under an FP8 recipe the products of the transformer layers are in FP8, everything else, output
layer included, in bfloat16; their kernels take multiples of some tokens, so inputs are filled up.

Invariant: ``hidden_states(ids) @ output_weight.T`` are the logits that training computes, and ids at or above
``vocab_size`` are padding that no one may score. What is filled in comes behind or beside what was given, is
cut off again, and is a copy of it. It can change a result only under ``fp8_tensorwise``, whose scale of an
activation is that of the whole batch, and there by FP8 rounding at most; the other recipes scale within a
token.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.config.validate import cross_section_faults
from megatron_tokedit.engine import checkpoint, checkpoint_folder, extra_state, preflight
from megatron_tokedit.engine.initialize import ParallelContext, current_context, initialize
from megatron_tokedit.engine.model import build_model, unwrap
from megatron_tokedit.errors import CheckpointError, ConfigError


class LanguageModel:
    """A built GPT model (tensor- and pipeline-parallel size 1), for forward passes only.

    Attributes:
        vocab_size: real vocabulary.
        max_context_tokens: longest input.
        model_config: the model's section.
        tokenizer_spec: what the checkpoint recorded of its tokenizer, or None.
        checkpoint: the step folder it came from.
        device: where it computes.
        precision: what it computes in.
    """

    def __init__(
        self,
        module: Any,
        model_config: ModelConfig,
        vocab_size: int,
        device: torch.device,
        *,
        precision: PrecisionConfig,
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
        self.precision = precision
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
        """Of hidden states and the output layer."""
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
        num_rows, length = ids_BT.shape
        filled_BT = fill_up(ids_BT, self.precision.traits.token_multiple, self.max_context_tokens)
        positions = torch.arange(filled_BT.size(1), device=filled_BT.device).expand_as(filled_BT)
        hidden_TBH: torch.Tensor = self._gpt(filled_BT, positions, None)
        return hidden_TBH.transpose(0, 1)[:num_rows, :length]

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
            if self.precision.is_fp8:
                digest.update(self.precision.recipe.encode())
            for name, parameter in sorted(self._gpt.named_parameters()):
                rows = (
                    self.vocab_size
                    if name.endswith(("word_embeddings.weight", "output_layer.weight"))
                    else None
                )
                data = extra_state.plain(parameter)[:rows].contiguous().cpu()
                digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
                digest.update(data.view(torch.uint8).numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def fill_up(ids_BT: torch.Tensor, multiple: int, max_positions: int) -> torch.Tensor:
    """Ids with as many tokens as FP8 products take.

    Args:
        ids_BT: int64 ``[B, T]``.
        multiple: what the number of tokens is to divide by.
        max_positions: longest row there may be.

    Returns:
        ``[B', T']``: the first row again, or the last token of every row again, whichever makes less work.
    """
    num_rows, length = ids_BT.shape
    if num_rows * length % multiple == 0:
        return ids_BT
    row_step = multiple // math.gcd(length, multiple)
    rows = math.ceil(num_rows / row_step) * row_step
    position_step = multiple // math.gcd(num_rows, multiple)
    positions = math.ceil(length / position_step) * position_step
    if positions <= max_positions and num_rows * positions < rows * length:
        return torch.cat([ids_BT, ids_BT[:, -1:].expand(-1, positions - length)], dim=1)
    return torch.cat([ids_BT, ids_BT[:1].expand(rows - num_rows, -1)])


def scoring_precision(recorded: PrecisionConfig, asked: PrecisionConfig | str | None) -> PrecisionConfig:
    """What a checkpoint is scored in.

    Args:
        recorded: what it was trained in; its further settings count where the recipe is the same.
        asked: a recipe, its name, or None for the recorded one.

    Raises:
        ConfigError: a recipe whose scales depend on what was scored before.
    """
    if isinstance(asked, str):
        asked = None if asked == recorded.recipe else PrecisionConfig.model_validate({"recipe": asked})
    precision = asked or recorded
    if precision.traits.has_amax_history:
        raise ConfigError(
            f"precision.recipe: {precision.recipe} scales by what was computed before, so the score of a "
            f"text would depend on the texts before it; score in bf16 or fp8_tensorwise"
        )
    of_training = ("cuda_graph_scope", "cross_entropy_loss_fusion", "cross_entropy_fusion_impl")
    return precision.model_copy(update={"cuda_graph_impl": "none", **dict.fromkeys(of_training)})


def scoring_faults(path: str | Path, recipe: str) -> list[str]:
    """What keeps a checkpoint from being scored in a recipe on this machine, one sentence each.

    Raises:
        CheckpointError: no complete checkpoint, or a damaged one.
        ConfigError: a recipe whose scales depend on what was scored before, or a broken package.
    """
    preflight.check()
    folder = checkpoint_folder.require(path)
    run_config = checkpoint_folder.read_json(folder, checkpoint_folder.RUN_CONFIG_FILE)
    recorded = PrecisionConfig.model_validate(run_config.get("precision", {}))
    sections = {
        "model": ModelConfig.model_validate(run_config["model"]),
        "parallel": ParallelConfig(),
        "precision": scoring_precision(recorded, recipe),
    }
    faults = [*cross_section_faults(sections), *preflight.section_faults(sections, preflight.probe())]
    return [fault.problem for fault in faults]


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
        ConfigError: a device that is not there, or a recipe that this machine does not have.
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
    recorded = PrecisionConfig.model_validate(run_config.get("precision", {}))
    precision = scoring_precision(recorded, precision)
    preflight.refuse_faults(precision, ParallelConfig())
    ctx = _inference_context(device)
    with torch.no_grad():  # FP8 weights then come without a second copy for a backward pass
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
        precision=precision,
        tokenizer_spec=state.get("tokenizer"),
        checkpoint_folder=folder,
    )
