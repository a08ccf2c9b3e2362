"""AdamW and the learning-rate schedule, both megatron-core's.

Invariant: nothing here computes an update or a learning rate of its own; it maps our sections to
megatron-core's arguments and mends what 0.16.1 cannot do with torch's own AdamW.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_tokedit.config.sections import OptimizerConfig, ParallelConfig, PrecisionConfig, ScheduleConfig
from megatron_tokedit.engine import cpu_device
from megatron_tokedit.engine import precision as precision_recipes
from megatron_tokedit.engine.initialize import ParallelContext


def build_optimizer(
    optimizer: OptimizerConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    model: list[Any],
    ctx: ParallelContext,
) -> Any:
    """Build megatron-core's optimizer over ``model`` (wrapped in DDP). Collective over the world."""
    from megatron.core.optimizer import OptimizerConfig as CoreConfig
    from megatron.core.optimizer import get_megatron_optimizer

    config = CoreConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        **precision_recipes.resolve(precision, ctx.device).optimizer,
    )
    with cpu_device.cuda_type_names():
        built = get_megatron_optimizer(config, model, use_gloo_process_groups=ctx.device.type == "cuda")
    for part in built.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _mend_torch_adamw(part)
    return built


def _mend_torch_adamw(part: Any) -> None:
    """Make megatron-core's optimizer work with torch's AdamW (used without Transformer Engine and apex).

    - Use the fused kernel.
    - Allocate the state now: saving or loading a fresh optimizer fails otherwise.
    - Keep the entry 'step' when a fully reshardable checkpoint is loaded: the file has none a parameter, and
      0.16.1 raises ``KeyError: 'step'``.
    """
    inner = part.optimizer
    for group in inner.param_groups:
        group.update(fused=True, foreach=False)
        for parameter in group["params"]:
            inner.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    set_states = getattr(part, "_set_main_param_and_optimizer_states", None)
    if set_states is None:
        return

    def set_states_and_step(model_param: Any, tensors: dict[str, Any]) -> None:
        group_index, group_order = part.model_param_group_index_map[model_param]
        main_param = inner.param_groups[group_index]["params"][group_order]
        set_states(model_param, {"step": inner.state[main_param]["step"], **tensors})

    part._set_main_param_and_optimizer_states = set_states_and_step


def load_optimizer(core_optimizer: Any, state_dict: Any) -> None:
    """Load a state dict from a checkpoint, keeping the hyper-parameters this run was configured with.

    megatron-core's loading takes learning-rate bounds, betas and weight decay from the checkpoint, and hands
    all parameters of torch's AdamW one shared ``step`` tensor, which would then be counted up once a
    parameter.
    """
    parts = core_optimizer.chained_optimizers
    configured = [
        [{k: v for k, v in group.items() if k not in ("params", "step")} for group in part.param_groups]
        for part in parts
    ]
    core_optimizer.load_state_dict(state_dict)
    for part, groups in zip(parts, configured, strict=True):
        for group, kept in zip(part.param_groups, groups, strict=True):
            group.update(kept)
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()


def build_scheduler(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, core_optimizer: Any, *, train_steps: int
) -> Any:
    """Build megatron-core's ``OptimizerParamScheduler``, counting in steps.

    The learning rate rises linearly from 0 over ``lr_warmup_steps`` and reaches ``min_lr`` at
    ``lr_decay_steps`` (default ``train_steps``); weight decay is constant.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    decay_steps = max(schedule.lr_decay_steps or train_steps, schedule.lr_warmup_steps + 1)
    scheduler = OptimizerParamScheduler(
        core_optimizer,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=schedule.lr_warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return scheduler


def learning_rate(core_optimizer: Any) -> float:
    """Learning rate of the next step."""
    return float(core_optimizer.param_groups[0]["lr"])
