"""Which cells a collapse experiment consists of: the arms, generation by generation, seed by seed.

Invariant: arms share what is the same (the first model, its text), since cells are known by their content.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tokedit.config.collapse import CollapseConfig
from megatron_tokedit.experiments.collapse_cells import (
    TEXTS,
    Corpus,
    EditedText,
    HumanText,
    Model,
    Perplexity,
    SyntheticText,
    Tokenized,
)
from megatron_tokedit.tokenizers import load_tokenizer

UNEDITED = "unedited"
"""What the ablations are held against."""
_SEEDS_APART = 1_000_003


@dataclass(frozen=True)
class Measurement:
    """One point of a figure.

    Attributes:
        arm: ``synthetic``, ``accumulate``, ``edited``, ``mix`` or ``ablation``.
        point: generation (from 1), share of synthetic text, or the ablation's name.
        seed: of the experiment it belongs to.
        perplexity: of the model.
        corpus: the newest corpus the model was trained on.
    """

    arm: str
    point: int | float | str
    seed: int
    perplexity: Perplexity
    corpus: Corpus


class Experiment:
    """All cells of an experiment.

    Args:
        config: the experiment.

    Raises:
        DataFormatError: a file of human text is missing or unreadable.
        TokenizerError: the tokenizer cannot be loaded.
    """

    def __init__(self, config: CollapseConfig) -> None:
        self.config = config
        tokenizer = load_tokenizer(config.tokenizer.type, config.tokenizer.model)
        self._fingerprint = tokenizer.fingerprint
        self.human_text = HumanText.of(config.human)
        self.human = self._tokenized(self.human_text, TEXTS)
        self._held_out = {
            name: self._tokenized(self.human_text, HumanText.held_out_file(name))
            for name in config.human.domains
        }

    def measurements(self) -> list[Measurement]:
        """Every point of every arm, seed by seed."""
        found = []
        for seed in self.config.seeds:
            first = Model(self.config, ((self.human, None),), seed)
            for arm in self.config.arms:
                found += list(self._mix(first, seed) if arm == "mix" else self._chain(arm, first, seed))
            if self.config.ablations:
                found.append(self._measured("ablation", UNEDITED, seed, self.human))
            for name, edit in self.config.ablations.items():
                corpus = EditedText(self.config, self.human, first, dict(edit), seed)
                found.append(self._measured("ablation", name, seed, corpus))
        return found

    def _tokenized(self, source: HumanText | SyntheticText, file: str) -> Tokenized:
        return Tokenized(self.config, source, file, self._fingerprint)

    def _written_by(self, model: Model, seed: int, generation: int) -> Tokenized:
        """The text that a model writes for the next generation."""
        draws = seed * _SEEDS_APART + generation  # other draws for the same prompts in every generation
        return self._tokenized(SyntheticText(self.config, model, self.human_text, draws), TEXTS)

    def _measured(self, arm: str, point: int | float | str, seed: int, corpus: Corpus) -> Measurement:
        """Of a model trained on one corpus."""
        model = Model(self.config, ((corpus, None),), seed)
        return Measurement(arm, point, seed, Perplexity(model, self._held_out), corpus)

    def _chain(self, arm: str, first: Model, seed: int) -> Iterator[Measurement]:
        """The generations of one arm."""
        corpora: list[tuple[Corpus, float | None]] = [(self.human, None)]
        model = first
        yield Measurement(arm, 1, seed, Perplexity(model, self._held_out), self.human)
        for generation in range(2, self.config.generations + 1):
            if arm == "edited":
                draws = seed * _SEEDS_APART + generation
                corpus: Corpus = EditedText(self.config, corpora[0][0], model, dict(self.config.edit), draws)
            else:
                corpus = self._written_by(model, seed, generation)
            corpora = [*corpora, (corpus, None)] if arm == "accumulate" else [(corpus, None)]
            model = Model(self.config, tuple(corpora), seed)
            yield Measurement(arm, generation, seed, Perplexity(model, self._held_out), corpus)

    def _mix(self, first: Model, seed: int) -> Iterator[Measurement]:
        """Human text and the first model's, in several shares."""
        synthetic = self._written_by(first, seed, 2)
        for share in self.config.mix_shares:
            if share in (0.0, 1.0):
                yield self._measured("mix", share, seed, synthetic if share else self.human)
                continue
            model = Model(self.config, ((self.human, 1.0 - share), (synthetic, share)), seed)
            yield Measurement("mix", share, seed, Perplexity(model, self._held_out), synthetic)
