"""The parts of a run before its first step: datasets, model, optimizer and schedule, where the run stands.

Invariant: after these functions a resumed run is where an undisturbed one would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tokedit.config.batch_sizes import total_samples
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset.blend import BlendState, Datasets, build_datasets, resume_blend
from megatron_tokedit.dataset.rank_zero import from_rank_zero
from megatron_tokedit.dataset.source_table import validation_table
from megatron_tokedit.dataset.sources import (
    SourceInfo,
    format_shares,
    inspect_sources,
    prefix_of,
    source_shares,
)
from megatron_tokedit.engine import checkpoint, user_buffers
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.model import build_model
from megatron_tokedit.engine.optimizer import build_optimizer, build_scheduler, go_to
from megatron_tokedit.log import get_logger
from megatron_tokedit.training.length import last_sample, sft_of
from megatron_tokedit.training.origin import Origin
from megatron_tokedit.training.state import TrainState

logger = get_logger(__name__)

Trained = tuple[list[Any], Any, Any]
"""Model chunks, optimizer, scheduler."""


def open_data(
    config: RunConfig, tokenizer_spec: Mapping[str, Any], origin: Origin, state: TrainState, *, speaks: bool
) -> tuple[Datasets, dict[str, str]]:
    """The datasets, going on in every source where the run left off. Collective over the world.

    Args:
        config: resolved.
        tokenizer_spec: of the run.
        origin: the checkpoint that the run goes on from, if any.
        state: how far the run is.
        speaks: whether to log what has changed; true on one rank only.

    Returns:
        The datasets, and the identity of each validation source's content.
    """
    data, seq_length, consumed = config.data, config.model.seq_length, state.consumed_samples
    num_samples = total_samples(config.training, step=state.step, consumed_samples=consumed)
    sft, train_epochs = sft_of(config), config.training.train_epochs
    infos = from_rank_zero(
        lambda: inspect_sources(data, tokenizer_spec=tokenizer_spec, seq_length=seq_length, sft=sft)
    )
    recorded = origin.state.get("blend") if origin.is_own else None
    blend, changes = resume_blend(
        BlendState.from_mapping(recorded) if recorded else None,
        consumed,
        data,
        infos,
        drawn=origin.state.get("drawn_samples") if recorded else None,
        train_epochs=train_epochs,
    )
    num_samples = last_sample(config, infos, blend, num_samples)
    for change in changes if speaks else ():
        logger.warning("data: %s", change)
    shares = source_shares(
        data,
        infos,
        num_train_samples=num_samples,
        seq_length=seq_length,
        state=blend,
        start_sample=consumed,
        train_epochs=train_epochs,
    )
    table = format_shares(shares) + _held_out(config, infos)
    logger.info("training data:\n  %s", "\n  ".join(table))
    datasets = build_datasets(
        data,
        infos,
        num_train_samples=num_samples,
        seq_length=seq_length,
        seed=config.seed,
        tokenizer_spec=tokenizer_spec,
        cache_dir=data.cache_dir or Path(config.run_dir) / "index_cache",
        blend_state=blend,
        start_sample=consumed,
        training=config.training,
        sft=sft,
    )
    return datasets, {source.name: infos[prefix_of(source)].identity for source in data.validation}


def _held_out(config: RunConfig, infos: Mapping[str, SourceInfo]) -> list[str]:
    """The table of the validation conversations, if there are any."""
    known = [(source.name, infos[prefix_of(source)].conversations) for source in config.data.validation]
    found = [(name, counts) for name, counts in known if counts is not None]
    return validation_table(found) if found else []


def build_trained(config: RunConfig, ctx: ParallelContext, state: TrainState) -> Trained:
    """Model, optimizer and schedule at their beginning. Collective over the world.

    The length of a schedule in tokens counts what was consumed up to ``state`` as it was.
    """
    micro_batch_size = config.training.micro_batch_size
    user_buffers.make(config.model, config.parallel, config.precision, micro_batch_size=micro_batch_size)
    model = build_model(
        config.model,
        config.precision,
        ctx,
        config.model.vocab_size or 0,
        parallel=config.parallel,
        wrap_with_ddp=True,
        documents_masked=config.data.reset_attention_mask,
    )
    for chunk in model:
        chunk.train()
    optimizer = build_optimizer(config.optimizer, config.precision, config.parallel, model, ctx)
    scheduler = build_scheduler(
        config.optimizer,
        config.schedule,
        optimizer,
        train_steps=config.training.train_steps,
        train_tokens=config.model.seq_length
        * total_samples(config.training, step=state.step, consumed_samples=state.consumed_samples),
    )
    return model, optimizer, scheduler


def load_trained(
    trained: Trained, config: RunConfig, ctx: ParallelContext, folder: str, *, state: TrainState, is_own: bool
) -> None:
    """Load weights and, from a run's own checkpoint or where they are kept, the optimizer's moments.

    The schedule is this run's, at the place where the run stands. Collective over the world.

    Args:
        trained: from :func:`build_trained`.
        config: resolved.
        ctx: the layout.
        folder: the checkpoint.
        state: how far the run is.
        is_own: the checkpoint is the run's own.
    """
    model, optimizer, scheduler = trained
    initial = config.init_from
    with_optimizer = is_own or (initial is not None and initial.optimizer == "kept")
    checkpoint.load(
        folder,
        model=model,
        optimizer=optimizer if with_optimizer else None,
        scheduler=None,
        ctx=ctx,
        random_states=is_own,
        fully_parallel=config.checkpoint.fully_parallel_load,
        main_parameters_of=None if with_optimizer else optimizer,
    )
    tokens = state.consumed_samples * config.model.seq_length
    go_to(scheduler, tokens if config.schedule.in_tokens else state.step)
    if is_own:
        logger.info("resuming after step %d from %s", state.step, folder)
    else:
        kept = "kept" if with_optimizer else "fresh"
        logger.info("starting from the weights of %s, with a %s optimizer", folder, kept)
