"""How far a run has come in each of its sources, and how it goes on when its sources change.

A run's samples are numbered from 0. A stretch of them is drawn in one order (megatron-core's, over the shares
of its sources); a change of the sources begins a new stretch. Of each source a counter is kept, and draw
``k`` of a source is always the same sample: number ``k % len`` of epoch ``k // len``.

Invariant: whatever is changed on the way, and however often, no sample of a source's epoch is drawn twice or
left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_tokedit.config.sections import DataConfig
from megatron_tokedit.dataset.sources import SourceInfo, asked_shares, prefix_of
from megatron_tokedit.errors import CheckpointError, ConfigError, DataFormatError

STATE_KEY = "blend"
"""Where a checkpoint's ``state.json`` keeps a :class:`BlendState`."""


@dataclass(frozen=True, slots=True)
class BlendState:
    """One stretch of a run's samples.

    Attributes:
        start_sample: its first sample.
        counters: source -> samples drawn from it before ``start_sample``; also of sources that are not drawn
            from any more.
        identities: source -> identity of its content, for the same sources.
        shares: source -> its share of the stretch, in the order in which megatron-core blends them.
        asked: source -> weight or token budget in the configuration that began the stretch.
        by_tokens: ``asked`` are token budgets.
        seed: of the order inside the sources; None until :func:`..blend.build_datasets` was called.
    """

    start_sample: int
    counters: dict[str, int]
    identities: dict[str, str]
    shares: dict[str, float]
    asked: dict[str, float]
    by_tokens: bool = False
    seed: int | None = None

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values; sources are a list, since their order counts and JSON objects may get sorted."""
        order = [*self.shares, *(name for name in self.counters if name not in self.shares)]
        sources = [
            {
                "name": name,
                "drawn_samples": self.counters[name],
                "identity": self.identities[name],
                "share": self.shares.get(name),
                "asked": self.asked.get(name),
            }
            for name in order
        ]
        return {
            "start_sample": self.start_sample,
            "by_tokens": self.by_tokens,
            "seed": self.seed,
            "sources": sources,
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> BlendState:
        """What :meth:`to_mapping` gave.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            sources = values["sources"]
            return cls(
                start_sample=values["start_sample"],
                counters={source["name"]: source["drawn_samples"] for source in sources},
                identities={source["name"]: source["identity"] for source in sources},
                shares={s["name"]: s["share"] for s in sources if s["share"] is not None},
                asked={s["name"]: s["asked"] for s in sources if s["asked"] is not None},
                by_tokens=values["by_tokens"],
                seed=values["seed"],
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint's record of the data blend is damaged: {error!r}"
            ) from error

    def counters_at(self, sample: int) -> dict[str, int]:
        """Samples drawn from each source before ``sample`` of this stretch, counted draw by draw."""
        num_samples = sample - self.start_sample
        if num_samples < 0:
            raise ValueError(f"sample {sample} is before this stretch, which starts at {self.start_sample}")
        drawn = [num_samples]
        if len(self.shares) > 1:
            from megatron_tokedit.dataset.index_cache import blend_order  # imports torch

            sources_N, _ = blend_order([*self.shares.values()], num_samples)
            drawn = np.bincount(sources_N, minlength=len(self.shares)).tolist()
        counts = dict(zip(self.shares, drawn, strict=True))
        return {name: before + counts.get(name, 0) for name, before in self.counters.items()}

    def expected_at(self, sample: float) -> dict[str, float]:
        """:meth:`counters_at` by the shares alone: within a few samples, in no time."""
        num_samples = sample - self.start_sample
        return {
            name: before + self.shares.get(name, 0.0) * num_samples for name, before in self.counters.items()
        }

    def budgets_end(self, infos: Mapping[str, SourceInfo]) -> int:
        """One past the sample that uses up all budgets; of epochs the last sample of the run.

        The blend's order gives every source exactly its budget by then: megatron-core draws from a source
        only while it is behind its share, so that at the end none can be ahead.

        Args:
            infos: of the sources, by name.
        """
        left = (
            self.asked[name] / infos[name].seq_length - self.counters[name]
            for name in self.shares
            if name in self.asked
        )
        return self.start_sample + round(sum(left))


def resume_blend(
    recorded: BlendState | None,
    consumed_samples: int,
    data: DataConfig,
    infos: Mapping[str, SourceInfo],
    *,
    drawn: Mapping[str, int] | None = None,
    train_epochs: float | None = None,
) -> tuple[BlendState, list[str]]:
    """The stretch of the samples from ``consumed_samples`` on, and what is different about it.

    Not collective; the same on every rank. With the sources and weights that are recorded the stretch is the
    recorded one, whatever else has changed. Else a new one begins at ``consumed_samples``, with every source
    at its counter. A source under a new name whose content is that of one that is gone was renamed and keeps
    its counter. Token budgets are of the whole run: what was drawn already is taken off them.

    Args:
        recorded: the checkpoint's; None in a new run, and for a checkpoint without one.
        consumed_samples: samples that the run has drawn.
        data: the sources now.
        infos: of the sources, by prefix.
        drawn: source -> samples drawn before ``consumed_samples``, as the checkpoint says; else they are
            counted draw by draw.
        train_epochs: of stage ``sft``.

    Returns:
        The state, and the changes in words (empty where nothing has changed).

    Raises:
        DataFormatError: a source's content changed under its name.
        ConfigError: no budget is left.
    """
    asked, by_tokens = asked_shares(data, infos, train_epochs)
    by_name = {source.name: infos[prefix_of(source)] for source in data.train}
    identities = {name: info.identity for name, info in by_name.items()}
    if recorded is None:
        state = BlendState(0, dict.fromkeys(asked, 0), identities, _normalized(asked), asked, by_tokens)
        unknown = (
            "the checkpoint does not record what was drawn from each source: taken as drawn as it is now"
        )
        return state, [unknown] if consumed_samples else []
    _refuse_changed_content(recorded, consumed_samples, identities)
    if _same_blend(recorded, asked, by_tokens):
        return recorded, []
    counters, known, changes = _carried_over(recorded, consumed_samples, identities, drawn)
    rows = {name: info.seq_length for name, info in by_name.items() if info.conversations}
    changes += _changed_shares(recorded, asked, by_tokens, rows)
    wanted = dict(asked)
    if by_tokens:
        wanted, used_up = _remaining(asked, counters, {name: by_name[name].seq_length for name in asked})
        changes += used_up
    state = BlendState(
        consumed_samples, counters, known, _normalized(wanted), asked, by_tokens, recorded.seed
    )
    return state, changes


def _normalized(weights: Mapping[str, float]) -> dict[str, float]:
    """As shares, computed as megatron-core does."""
    values = np.array([*weights.values()], dtype=np.float64)
    return dict(zip(weights, (values / values.sum()).tolist(), strict=True))


def _refuse_changed_content(
    recorded: BlendState, consumed_samples: int, identities: Mapping[str, str]
) -> None:
    drawn = recorded.expected_at(consumed_samples)
    changed = [
        f"{name} (after {round(drawn[name]):,} samples)"
        for name, identity in identities.items()
        if recorded.identities.get(name, identity) != identity
    ]
    if changed:
        raise DataFormatError(
            f"sources whose content is not what this run was drawing from: {', '.join(changed)}; their "
            f"counters mean nothing in other data. Put the dataset back, or give the new one another name in "
            f"data.train: it then starts at its first sample"
        )


def _same_blend(recorded: BlendState, asked: Mapping[str, float], by_tokens: bool) -> bool:
    """Whether the configuration is the one that began the recorded stretch, order of sources aside."""
    if recorded.asked.keys() != asked.keys() or recorded.by_tokens != by_tokens:
        return False
    old, new = dict(recorded.asked), dict(asked)
    if not by_tokens:
        old, new = _normalized(old), _normalized({name: asked[name] for name in old})
    return all(math.isclose(old[name], new[name], rel_tol=1e-12) for name in new)


def _carried_over(
    recorded: BlendState,
    consumed_samples: int,
    identities: Mapping[str, str],
    drawn: Mapping[str, int] | None,
) -> tuple[dict[str, int], dict[str, str], list[str]]:
    """Counters and identities at ``consumed_samples`` under the present names, and what became of names."""
    reached = recorded.counters_at(consumed_samples) if drawn is None else dict(drawn)
    content = dict(recorded.identities)
    changes = []
    for name, identity in identities.items():
        if name not in reached:
            gone = [old for old in content if old not in identities and content[old] == identity]
            reached[name] = reached.pop(gone[0]) if gone else 0
            content[name] = content.pop(gone[0]) if gone else identity
            was = f"is {gone[0]} under a new name" if gone else "is new"
            changes.append(f"source {name} {was}: it goes on after {reached[name]:,} samples")
        elif name not in recorded.asked:
            changes.append(f"source {name} is back: it goes on after {reached[name]:,} samples")
    changes += [
        f"source {name} is gone, after {reached[name]:,} samples"
        for name in recorded.asked
        if name not in identities and name in reached
    ]
    return reached, content, changes


def _changed_shares(
    recorded: BlendState, asked: Mapping[str, float], by_tokens: bool, row_lengths: Mapping[str, int]
) -> Iterator[str]:
    """Sources whose weight or budget is another; epochs of conversations are spoken of as rows."""

    def in_words(name: str, value: float, is_budget: bool) -> str:
        if is_budget and name in row_lengths:
            return f"{value / row_lengths[name]:,g} rows"
        return f"{'token budget' if is_budget else 'weight'} {value:,g}"

    for name, value in asked.items():
        if name in recorded.asked and (recorded.asked[name], recorded.by_tokens) != (value, by_tokens):
            old = in_words(name, recorded.asked[name], recorded.by_tokens)
            yield f"source {name}: {old}, now {in_words(name, value, by_tokens)}"


def _remaining(
    budgets: Mapping[str, float], counters: Mapping[str, int], seq_lengths: Mapping[str, int]
) -> tuple[dict[str, float], list[str]]:
    """What is left of the budgets, and which are used up.

    Raises:
        ConfigError: all are.
    """
    left = {name: budget - counters[name] * seq_lengths[name] for name, budget in budgets.items()}
    used_up = [name for name, tokens in left.items() if tokens < seq_lengths[name]]
    if len(used_up) == len(left):
        raise ConfigError(
            f"data.train: the budgets of all sources ({', '.join(used_up)}) are used up; raise one (or its "
            f"epochs), or lower training.train_steps to where the run is"
        )
    changes = [f"source {name}: its budget is used up, it is not drawn from any more" for name in used_up]
    return {name: tokens for name, tokens in left.items() if name not in used_up}, changes
