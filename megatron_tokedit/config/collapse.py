"""The YAML file of a collapse experiment: human text, a small model, generations, arms.

Invariant: as for training runs, unknown keys and wrong types are refused together, each with its line; the
``run`` section is checked as the training run that it will become, every edit as the job that it will be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from megatron_tokedit.config.base import Section
from megatron_tokedit.config.data import TokenizerConfig
from megatron_tokedit.config.faults import Fault, raise_faults
from megatron_tokedit.config.load import apply_overrides, config_from_mapping, read_yaml, schema_fault
from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.errors import ConfigError

ArmName = Literal["synthetic", "accumulate", "edited", "mix"]
_RUN_SECTIONS = ("model", "parallel", "precision", "optimizer", "schedule", "training", "runtime")
_OWN_EDIT_SETTINGS = ("input", "output_prefix", "prior", "tokenizer_type", "tokenizer_model", "json_keys")


class HumanConfig(Section):
    """The human text that every arm starts from."""

    domains: dict[str, list[str]] = Field(min_length=1)
    """NAME -> files or patterns, as ``--input`` of ``tools/preprocess_edit.py``."""
    json_key: str = Field("text", min_length=1)
    held_out_share: float = Field(0.1, gt=0.0, lt=0.9)
    """Of the documents of each domain, chosen by their content; perplexity is measured on these."""
    max_bytes: PositiveInt | None = None
    """Text that is used of each domain; default: all of it."""
    document_characters: PositiveInt = 1500
    """Longer documents are cut at white space into texts of at most this size, which are as long as the texts
    that a model writes."""


class SynthesisConfig(Section):
    """How a model writes the next generation's text: one text for every human one, from its first words."""

    prompt_words: PositiveInt = 8
    max_new_tokens: PositiveInt | None = None
    """Default: as many as the model's context takes behind the prompt."""
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    batch_size: PositiveInt = 64


class CollapseConfig(Section):
    """A whole experiment."""

    output_dir: str = Field(min_length=1)
    """Holds every cell (a corpus, a model, a measurement) by its content, and the report."""
    human: HumanConfig
    tokenizer: TokenizerConfig
    run: dict[str, Any]
    """Sections of a training run (``model``, ``optimizer``, ``schedule``, ``training``, ``precision``,
    ``parallel``, ``runtime``): every model of the experiment is trained from scratch as these say."""
    arms: list[ArmName] = Field(["synthetic", "accumulate", "edited", "mix"], min_length=1)
    """``synthetic``: each generation is trained on the last model's text alone; ``accumulate``: on human text
    and that of all models so far; ``edited``: on the last generation's corpus, edited by the last model;
    ``mix``: not iterated, human text and the first model's in the shares ``mix_shares``."""
    generations: int = Field(5, ge=2)
    """Models of a chain; the first is trained on human text."""
    mix_shares: list[float] = Field([0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    """Shares of synthetic text in the arm ``mix``."""
    seeds: list[int] = Field([1, 2, 3], min_length=1)
    """Every seed is an experiment of its own, from weights to samples; error bars are over seeds."""
    synthesis: SynthesisConfig = SynthesisConfig()
    edit: dict[str, object] = Field(default_factory=dict)
    """Settings of ``tools/preprocess_edit.py`` for the arm ``edited``, with underscores."""
    ablations: dict[str, dict[str, object]] = Field(default_factory=dict)
    """NAME -> settings of an edit of the human text by the first model; a model is trained on each."""
    processes: PositiveInt = 1
    """Ranks of a training (torchrun)."""
    parallel_cells: PositiveInt = 1
    """Cells that are worked on at the same time; they share the machine's cores."""

    def run_config(self, run_dir: str, seed: int, sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The YAML tree of one training run of the experiment.

        Args:
            run_dir: its folder.
            seed: of weights and data order.
            sources: ``data.train``.
        """
        return {
            **self.run,
            "stage": "pretrain",
            "run_dir": run_dir,
            "seed": seed,
            "tokenizer": self.tokenizer.model_dump(),
            "data": {"train": list(sources)},
        }


def load_collapse_config(path: str, overrides: Sequence[str] = ()) -> CollapseConfig:
    """Read, override and check an experiment's configuration.

    Raises:
        ConfigError: one message with every fault.
    """
    tree, places, faults = read_yaml(path)
    faults += apply_overrides(tree, places, overrides)
    try:
        config = CollapseConfig.model_validate(tree, strict=True)
    except ValidationError as error:
        faults += [schema_fault(details, CollapseConfig).at(places) for details in error.errors()]
    else:
        faults += [fault.at(places) for fault in (*_own_faults(config), *_edit_faults(config))]
    raise_faults(faults, path)
    try:
        config_from_mapping(
            config.run_config("RUN_DIR", 1, [{"name": "human", "prefix": "PREFIX"}]), origin=""
        )
    except ConfigError as error:
        _, *problems = str(error).split("\n  - ")
        raise ConfigError("\n  - ".join([f"{path}: section run", *problems])) from error
    return config


def _own_faults(config: CollapseConfig) -> list[Fault]:
    faults = [
        Fault(("run", name), f"not a section of an experiment's runs; known here: {', '.join(_RUN_SECTIONS)}")
        for name in config.run
        if name not in _RUN_SECTIONS
    ]
    for name in ("seeds", "mix_shares", "arms"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            faults.append(Fault((name,), "a value stands there twice"))
    for index, share in enumerate(config.mix_shares):
        if not 0.0 <= share <= 1.0:
            faults.append(Fault(("mix_shares", index), f"got {share}, expected a share from 0 to 1"))
    faults += [
        Fault(("seeds", index), f"got {seed}, expected 0 or more")
        for index, seed in enumerate(config.seeds)
        if seed < 0
    ]
    return faults


def _edit_faults(config: CollapseConfig) -> list[Fault]:
    """Of ``edit`` and of every ablation, as ``tools/preprocess_edit.py`` would find them."""
    faults = []
    named = {("edit",): config.edit} | {("ablations", name): edit for name, edit in config.ablations.items()}
    for path, settings in named.items():
        misplaced = [name for name in _OWN_EDIT_SETTINGS if name in settings]
        faults += [Fault((*path, name), "is the experiment's own; remove it") for name in misplaced]
        given = {name: value for name, value in settings.items() if name not in misplaced}
        try:
            preprocess_config(
                given
                | {"input": ["FILE"], "output_prefix": "PREFIX", "prior": "MODEL"}
                | {"tokenizer_type": config.tokenizer.type, "tokenizer_model": config.tokenizer.model}
            )
        except ConfigError as error:
            faults.append(Fault(path, str(error)))
    return faults
