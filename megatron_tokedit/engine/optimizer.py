"""AdamW and the learning-rate schedule, both megatron-core's.

Invariant: nothing here computes an update or a learning rate of its own; it maps our sections to
megatron-core's arguments and mends what 0.16.1 cannot do with torch's own AdamW or with padded buckets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron_tokedit.config.batch_sizes import batch_stages, samples_before
from megatron_tokedit.config.sections import (
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)
from megatron_tokedit.engine import cpu_device, preflight
from megatron_tokedit.engine import precision as precision_recipes
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.optimizer_buckets import place_gathered_state
from megatron_tokedit.errors import ConfigError


def build_optimizer(
    optimizer: OptimizerConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    model: list[Any],
    ctx: ParallelContext,
) -> Any:
    """Build megatron-core's optimizer over ``model`` (wrapped in DDP). Collective over the world.

    Raises:
        ConfigError: a run on a CPU where megatron-core would take Transformer Engine's optimizer.
    """
    if ctx.device.type == "cpu" and preflight.probe().transformer_engine is not None:
        raise ConfigError(
            "runtime.device: this run is on a CPU, but Transformer Engine is installed, whose optimizer "
            "megatron-core takes wherever it can be imported and which needs a GPU; train on a GPU, or in an "
            "environment without it (made without the extra fp8)"
        )
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
        **precision_recipes.resolve(precision, ctx.device, parallel).optimizer,
    )
    with cpu_device.cuda_type_names():
        built = get_megatron_optimizer(config, model, use_gloo_process_groups=ctx.device.type == "cuda")
    for part in built.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _mend_torch_adamw(part)
        if hasattr(part, "get_parameter_state_dp_zero"):  # the distributed optimizer
            place_gathered_state(part)
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
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    core_optimizer: Any,
    *,
    train_steps: int,
    train_tokens: int | None = None,
) -> Any:
    """Build megatron-core's ``OptimizerParamScheduler``, counting in the schedule's unit.

    Advance it by 1 a step, or by the step's tokens where ``schedule.in_tokens``.

    Args:
        optimizer: learning rates and weight decay.
        schedule: shape and lengths.
        core_optimizer: anything with ``param_groups``.
        train_steps: of the whole run.
        train_tokens: of the whole run; needed where the schedule counts tokens.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    length = train_tokens if schedule.in_tokens else train_steps
    if length is None:
        raise ValueError("a schedule in tokens needs train_tokens")
    decay = max(schedule.decay or length, schedule.warmup + 1)
    start_wd, end_wd = schedule.start_weight_decay, schedule.end_weight_decay
    grows = start_wd is not None and end_wd is not None
    return OptimizerParamScheduler(
        core_optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=decay,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=start_wd if grows else optimizer.weight_decay,
        end_wd=end_wd if grows else optimizer.weight_decay,
        wd_incr_steps=length,
        wd_incr_style=schedule.weight_decay_incr_style if grows else "constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=schedule.wsd_decay,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )


def go_to(scheduler: Any, position: int) -> None:
    """Set learning rate and weight decay to those of ``position``, in the schedule's unit."""
    scheduler.num_steps = 0
    scheduler.step(increment=position)


def learning_rates(config: RunConfig, steps: Iterable[int]) -> list[float]:
    """The learning rate that each of ``steps`` (1 is the first) of an undisturbed run is made with.

    Needs no model and no process group.
    """
    stages = batch_stages(config.training)
    seq_length = config.model.seq_length
    scheduler = build_scheduler(
        config.optimizer,
        config.schedule,
        _Groups(),
        train_steps=config.training.train_steps,
        train_tokens=stages[-1].end_sample * seq_length,
    )
    rates = []
    for step in steps:
        done = samples_before(stages, step - 1) * seq_length if config.schedule.in_tokens else step - 1
        scheduler.step(increment=done - scheduler.num_steps)
        rates.append(learning_rate(scheduler.optimizer))
    return rates


class _Groups:
    """An optimizer of one parameter group without parameters."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{}]


def learning_rate(core_optimizer: Any) -> float:
    """Learning rate of the next step."""
    return float(core_optimizer.param_groups[0]["lr"])
