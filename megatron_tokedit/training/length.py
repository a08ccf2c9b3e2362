"""How far a run is and how long it gets, from its checkpoints and its data.

Invariant: a run of stage ``sft`` that is given in epochs ends with the sample that completes them, whatever
interrupted it and however its epochs were changed on the way. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tokedit.config.batch_sizes import batch_stages, steps_for
from megatron_tokedit.config.sections import RunConfig, SftConfig
from megatron_tokedit.dataset.blend_state import STATE_KEY, BlendState, resume_blend
from megatron_tokedit.dataset.sources import SourceInfo, inspect_sources, prefix_of
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import ConfigError


class Begun:
    """How far a run is: its newest complete checkpoint, or its beginning.

    Attributes:
        step: finished steps.
        consumed_samples: samples drawn.
        blend: recorded stretch of the data, if any.
        drawn: samples drawn from each source, as recorded.
        num_samples: that the run will have drawn when its ``training.train_steps`` are done.
    """

    def __init__(self, config: RunConfig) -> None:
        state: dict[str, Any] = {}
        if latest := checkpoint_folder.find_latest(Path(config.run_dir) / "checkpoints"):
            state = checkpoint_folder.read_json(latest, checkpoint_folder.STATE_FILE)
        self.step: int = state.get("step", 0)
        self.consumed_samples: int = state.get("consumed_samples", 0)
        self.blend = BlendState.from_mapping(state[STATE_KEY]) if STATE_KEY in state else None
        self.drawn: dict[str, int] | None = state.get("drawn_samples") if self.blend else None
        stages = batch_stages(config.training, step=self.step, consumed_samples=self.consumed_samples)
        self.num_samples = stages[-1].end_sample if stages else self.consumed_samples


def sft_of(config: RunConfig) -> SftConfig | None:
    """The settings of conversations, in stage ``sft`` only."""
    return config.sft if config.stage == "sft" else None


def is_in_epochs(config: RunConfig) -> bool:
    """Whether the run is as long as its epochs."""
    by_source = any(source.epochs is not None for source in config.data.train)
    return config.stage == "sft" and (by_source or config.training.train_epochs is not None)


def last_sample(
    config: RunConfig, infos: Mapping[str, SourceInfo], blend: BlendState, num_samples: int
) -> int:
    """One past the last sample of the run: that of its steps, or the one that completes its epochs.

    Args:
        config: of the run.
        infos: of the sources, by prefix.
        blend: the stretch of the samples to come.
        num_samples: of all steps.
    """
    if not is_in_epochs(config):
        return num_samples
    by_name = {source.name: infos[prefix_of(source)] for source in config.data.train}
    return min(num_samples, blend.budgets_end(by_name))


def with_train_steps(config: RunConfig, tokenizer_spec: Mapping[str, Any]) -> RunConfig:
    """The configuration with as many steps as its epochs come to. Not collective; reads the sources.

    Args:
        config: sound; one that is not in epochs is returned as it is.
        tokenizer_spec: of the run's tokenizer.

    Raises:
        ConfigError: ``training.train_steps`` says otherwise.
        DataFormatError: a source is missing, damaged or of another tokenizer, or cannot be learned from.
    """
    if not is_in_epochs(config):
        return config
    training, begun = config.training, Begun(config)
    infos = inspect_sources(
        config.data, tokenizer_spec=tokenizer_spec, seq_length=config.model.seq_length, sft=config.sft
    )
    blend, _ = resume_blend(
        begun.blend,
        begun.consumed_samples,
        config.data,
        infos,
        drawn=begun.drawn,
        train_epochs=training.train_epochs,
    )
    end = blend.budgets_end({source.name: infos[prefix_of(source)] for source in config.data.train})
    steps = begun.step + steps_for(training, end, consumed_samples=begun.consumed_samples)
    if training.train_steps not in (0, steps):
        raise ConfigError(
            f"training.train_steps: got {training.train_steps}, but the epochs come to {steps} steps "
            f"({end:,} rows); remove it, or the epochs"
        )
    return config.model_copy(update={"training": training.model_copy(update={"train_steps": steps})})
