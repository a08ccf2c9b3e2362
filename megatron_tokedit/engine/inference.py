"""A trained checkpoint as a language model for scoring: hidden states in, no logits; one process, or one copy
of the model over tensor- and pipeline-parallel ranks.

The scoring head multiplies hidden states by ``output_weight`` in chunks, so the logits of a whole batch
never exist. Under an FP8 recipe the products of the transformer layers are in FP8, everything else, output
layer included, in bfloat16; their kernels take multiples of some tokens, so inputs are filled up.

Invariant: ``hidden_states(ids) @ output_weight.T`` are the logits that training computes, and ids at or above
``vocab_size`` are padding that no one may score. What is filled in comes behind or beside what was given, is
cut off again, and is a copy of it. It can change a result only under ``fp8_tensorwise``, whose scale of an
activation is that of the whole batch, and there by FP8 rounding at most; the other recipes scale within a
token. Pipeline stages compute exactly what one process computes; tensor-parallel ranks add up their parts of
a sum and agree with it to float rounding.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.config.validate import cross_section_faults
from megatron_tokedit.engine import checkpoint, checkpoint_folder, extra_state, preflight
from megatron_tokedit.engine.initialize import ParallelContext, current_context, initialize
from megatron_tokedit.engine.model import build_model, unwrap
from megatron_tokedit.engine.pipeline_stages import Stages
from megatron_tokedit.engine.sizes import flops_per_token, num_parameters
from megatron_tokedit.errors import CheckpointError, ConfigError


class LanguageModel:
    """This rank's part of a built GPT model, for forward passes only.

    Attributes:
        ctx: the layout; without model parallelism the part is the whole.
        vocab_size: real vocabulary.
        max_context_tokens: longest input.
        model_config: the model's section.
        tokenizer_spec: what the checkpoint recorded of its tokenizer, or None.
        stop_ids: at which the published model that the checkpoint comes from ends a text; the end of a
            document need not be among them.
        checkpoint: the step folder it came from.
        device: where it computes.
        precision: what it computes in.
        gpt: megatron-core's model without its output layer, for who runs or replaces its layers.
        stages: how this rank's stage and its neighbours exchange hidden states; None: there is one stage.
    """

    def __init__(
        self,
        module: Any,
        model_config: ModelConfig,
        vocab_size: int,
        ctx: ParallelContext,
        *,
        precision: PrecisionConfig,
        tokenizer_spec: dict[str, Any] | None = None,
        stop_ids: tuple[int, ...] = (),
        checkpoint_folder: Path | None = None,
    ) -> None:
        self.gpt: Any = unwrap(module).eval()
        self.gpt.requires_grad_(False)
        self.gpt.post_process = False  # its forward then gives the decoder's output, final norm applied
        self.model_config = model_config
        self.vocab_size = vocab_size
        self.max_context_tokens = model_config.max_positions
        self.ctx = ctx
        self.device = ctx.device
        self.precision = precision
        self.tokenizer_spec = tokenizer_spec
        self.stop_ids = stop_ids
        self.checkpoint = checkpoint_folder
        self._fingerprint: str | None = None
        self.stages = Stages(self.gpt) if ctx.pp_size > 1 else None

    @property
    def output_weight(self) -> torch.Tensor:
        """``[padded vocabulary / tensor-parallel ranks, hidden]`` in the model's dtype; on ranks of the last
        stage only. Ids from ``vocab_size`` on are padding; the first row is that of ``first_output_id``.
        """
        assert self.ctx.is_last_stage, "the output layer is on the last stage"
        if self.gpt.share_embeddings_and_output_weights and self.ctx.is_first_stage:
            return self.gpt.embedding.word_embeddings.weight.detach()
        return self.gpt.output_layer.weight.detach()

    @property
    def first_output_id(self) -> int:
        """The id of the first row of ``output_weight``."""
        return self.ctx.tp_rank * self.output_weight.size(0)

    @property
    def layers(self) -> list[Any]:
        """megatron-core's transformer layers of this rank."""
        return list(self.gpt.decoder.layers)

    @property
    def tensor_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that share this one's layers."""
        from megatron.core import parallel_state

        group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        return group

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and parameters."""
        return next(self.gpt.parameters()).dtype

    @torch.inference_mode()
    def hidden_states(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm. Collective over the model-parallel ranks.

        Args:
            ids_BT: int64 ``[B, T]`` on :attr:`device`, ``T <= max_context_tokens``, the same on every rank.
                Attention is causal: what is padded on the right does not change what stands before it.

        Returns:
            ``[B, T, hidden]`` in the model's dtype; on a rank of another stage than the last nothing of use.
        """
        num_rows, length = ids_BT.shape
        is_cut = bool(self.gpt.config.sequence_parallel)
        filled_BT = self.filled(ids_BT)
        positions = torch.arange(filled_BT.size(1), device=filled_BT.device).expand_as(filled_BT)
        if self.stages is None:
            hidden_TBH: torch.Tensor = self.gpt(filled_BT, positions, None)
        else:
            hidden_TBH = self.stages.forward(filled_BT, positions)
        if is_cut and self.ctx.is_last_stage:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            hidden_TBH = gather_from_sequence_parallel_region(hidden_TBH, tensor_parallel_output_grad=False)
        return hidden_TBH.transpose(0, 1)[:num_rows, :length]

    def filled(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The ids with as many tokens as the layers take, ``[B', T']``; see :func:`fill_up`."""
        is_cut = bool(self.gpt.config.sequence_parallel)
        return fill_up(
            ids_BT,
            self.precision.traits.token_multiple,
            self.max_context_tokens,
            length_multiple=self.ctx.tp_size if is_cut else 1,
        )

    def count_parameters(self) -> tuple[int, int, int]:
        """What a forward pass of the whole model costs, whatever part of it is here.

        Returns:
            All parameters; those of matrix products that a token takes part in, output layer included,
            embedding tables and experts it is not sent to left out; query heads x size of a head, summed over
            layers.
        """
        config = self.gpt.config
        attention_width = config.num_layers * config.num_attention_heads * config.kv_channels
        if self.ctx.tp_size * self.ctx.pp_size > 1:
            products = round(flops_per_token(self.model_config, self.vocab_size, seq_length=1) / 6)
            everything = num_parameters(self.model_config, self.vocab_size)
            return everything, products - 2 * attention_width, attention_width
        parameters = dict(self.gpt.named_parameters())
        tables = {
            name for name in parameters if name.startswith("embedding.") or name.startswith("output_layer.")
        }
        matrices = {name: p.numel() for name, p in parameters.items() if p.ndim >= 2 and name not in tables}
        experts = sum(size for name, size in matrices.items() if ".experts." in name)
        if experts:
            experts -= experts * config.moe_router_topk // config.num_moe_experts
        return (
            sum(p.numel() for p in parameters.values()),
            sum(matrices.values()) - experts + self.vocab_size * config.hidden_size,
            attention_width,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over weights, dtype and architecture; padding rows are left out.

        It does not depend on the layout or the folder that the checkpoint was saved under. Of a model in one
        process.
        """
        assert self.ctx.tp_size == self.ctx.pp_size == 1, "a rank has a part of the weights only"
        if self._fingerprint is None:
            digest = hashlib.sha256(self.model_config.model_dump_json().encode())
            if self.precision.is_fp8:
                digest.update(self.precision.recipe.encode())
            for name, parameter in sorted(self.gpt.named_parameters()):
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


def fill_up(
    ids_BT: torch.Tensor, multiple: int, max_positions: int, *, length_multiple: int = 1
) -> torch.Tensor:
    """Ids with as many tokens as FP8 products take.

    Args:
        ids_BT: int64 ``[B, T]``.
        multiple: what the number of tokens is to divide by.
        max_positions: longest row there may be, but for what the next one adds.
        length_multiple: what the length of a row must divide by, whatever it costs.

    Returns:
        ``[B', T']``: the first row again, or the last token of every row again, whichever makes less work.
    """
    num_rows, length = ids_BT.shape
    if missing := -length % length_multiple:
        ids_BT = torch.cat([ids_BT, ids_BT[:, -1:].expand(-1, missing)], dim=1)
        length += missing
    if num_rows * length % multiple == 0:
        return ids_BT
    row_step = multiple // math.gcd(length, multiple)
    rows = math.ceil(num_rows / row_step) * row_step
    position_step = math.lcm(multiple // math.gcd(num_rows, multiple), length_multiple)
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


def scoring_layout(model: ModelConfig, tensor: int, pipeline: int) -> ParallelConfig:
    """The layout of one copy of a model; experts need their sequences cut among tensor-parallel ranks."""
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=tensor > 1 and model.family_traits.has_experts,
    )


def scoring_faults(path: str | Path, recipe: str, *, tensor: int = 1, pipeline: int = 1) -> list[Fault]:
    """What keeps a checkpoint from being scored in a recipe, in so many parts, on this machine.

    Raises:
        CheckpointError: no complete checkpoint, or a damaged one.
        ConfigError: a recipe whose scales depend on what was scored before, or a broken package.
    """
    preflight.check()
    folder = checkpoint_folder.require(path)
    run_config = checkpoint_folder.read_json(folder, checkpoint_folder.RUN_CONFIG_FILE)
    recorded = PrecisionConfig.model_validate(run_config.get("precision", {}))
    model = ModelConfig.model_validate(run_config["model"])
    sections = {
        "model": model,
        "parallel": scoring_layout(model, tensor, pipeline),
        "precision": scoring_precision(recorded, recipe),
    }
    return [*cross_section_faults(sections), *preflight.section_faults(sections, preflight.probe())]


def _inference_context(device: str, parallel: ParallelConfig) -> ParallelContext:
    """The present context where it has the layout that is asked for, else a new one.

    Without a process group it is one of this process alone.
    """
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return initialize(
            parallel,
            seed=0,
            device=device,
            cpu_threads=torch.get_num_threads(),  # the caller's choice: it may be one of several workers
            standalone=not dist.is_initialized(),
        )
    context = current_context()
    asked = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    if (context.tp_size, context.pp_size) != asked:
        raise CheckpointError(
            f"a checkpoint can be loaded for scoring only where tensor and pipeline parallel sizes are "
            f"{asked[0]} and {asked[1]}, and here they are {context.tp_size} and {context.pp_size}; "
            "score in a process of its own"
        )
    return context


def load_language_model(
    path: str | Path,
    *,
    device: str = "auto",
    precision: PrecisionConfig | str | None = None,
    tensor: int = 1,
    pipeline: int = 1,
) -> LanguageModel:
    """Load a checkpoint, saved under any layout, for scoring. Collective over the ranks of the process group.

    Args:
        path: a step folder, a run folder, or its ``checkpoints`` folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: recipe to compute in, or its name; default: the one it was trained with.
        tensor: tensor-parallel ranks; more than one need a process group.
        pipeline: pipeline stages; likewise.

    Raises:
        CheckpointError: no complete checkpoint, or one that does not record its model.
        ConfigError: a device that is not there, a recipe that this machine does not have, or sizes that do
            not divide the model or the process group.
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
    parallel = scoring_layout(model_config, tensor, pipeline)
    preflight.refuse_faults(precision, parallel)
    ctx = _inference_context(device, parallel)
    with torch.no_grad():  # FP8 weights then come without a second copy for a backward pass
        model = build_model(
            model_config,
            precision,
            ctx,
            state["vocab_size"],
            parallel=parallel,
            wrap_with_ddp=False,
            perform_initialization=False,
        )
    checkpoint.load(folder, model=model, optimizer=None, scheduler=None, ctx=ctx)
    return LanguageModel(
        model[0],
        model_config,
        state["vocab_size"],
        ctx,
        precision=precision,
        tokenizer_spec=state.get("tokenizer"),
        stop_ids=tuple(state.get("stop_ids", ())),
        checkpoint_folder=folder,
    )
