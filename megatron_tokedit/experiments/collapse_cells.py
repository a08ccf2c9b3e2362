"""The cells of a collapse experiment: human text, synthetic and edited corpora, models, perplexities.

A corpus is a cell whose folder holds ``corpus.jsonl`` and the dataset ``corpus_text_document``. Invariant:
every cell is made by the project's own commands, as a person would type them; they are in its ``log.txt``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml

from megatron_tokedit.config.collapse import CollapseConfig, HumanConfig
from megatron_tokedit.corpus import BadLine, expand_inputs, plan_units, read_unit
from megatron_tokedit.dataset import IndexedDataset, atomic_write_bytes
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.experiments.cells import Bench, Cell, Store
from megatron_tokedit.tokenizers import load_tokenizer

TEXTS = "corpus.jsonl"
PREFIX = "corpus_text_document"
RUN = "run"
_SHARES = 1 << 32


@dataclass(frozen=True, eq=False)
class HumanText(Cell):
    """The human documents: cut to size, a part of every domain held out.

    Attributes:
        human: which files, and how.
        digests: domain -> SHA-256 of its files.
    """

    human: HumanConfig
    digests: dict[str, list[str]]

    @staticmethod
    def of(human: HumanConfig) -> HumanText:
        """With the digests of its files.

        Raises:
            DataFormatError: a file is missing or unreadable.
        """
        digests = {
            name: [file.sha256 for file in plan_units(expand_inputs(patterns))[0]]
            for name, patterns in human.domains.items()
        }
        return HumanText(human, digests)

    @property
    def parents(self) -> Sequence[Cell]:
        """None."""
        return ()

    @property
    def settings(self) -> dict[str, Any]:
        """The files' contents and all that decides about a document; not where they lie."""
        return {"digests": self.digests} | self.human.model_dump(exclude={"domains"})

    @staticmethod
    def held_out_file(name: str) -> str:
        """Of one domain."""
        return f"held_out_{name}.jsonl"

    def make(self, bench: Bench) -> dict[str, Any]:
        """``corpus.jsonl`` of all domains, and ``held_out_NAME.jsonl``.

        Raises:
            DataFormatError: a broken line, or a domain with too little text to hold some out.
        """
        counts: dict[str, dict[str, int]] = {}
        train: list[bytes] = []
        for name, patterns in self.human.domains.items():
            parts: dict[bool, list[bytes]] = {True: [], False: []}
            for text in self._texts(patterns):
                parts[_is_held_out(text, self.human.held_out_share)].append(orjson.dumps({"text": text}))
            counts[name] = {"train": len(parts[False]), "held_out": len(parts[True])}
            if not all(counts[name].values()):
                raise DataFormatError(
                    f"human.domains.{name}: {counts[name]['train']} texts to train on and "
                    f"{counts[name]['held_out']} held out; both are needed: more text, or another share"
                )
            train += parts[False]
            atomic_write_bytes(bench.place / self.held_out_file(name), b"\n".join(parts[True]) + b"\n")
        atomic_write_bytes(bench.place / TEXTS, b"\n".join(train) + b"\n")
        return {"domains": counts}

    def _texts(self, patterns: Sequence[str]) -> Iterator[str]:
        """Texts of one domain, at most ``max_bytes`` of them."""
        left = self.human.max_bytes
        for unit in plan_units(expand_inputs(patterns))[1]:
            for document in read_unit(unit, [self.human.json_key], on_bad=_refuse):
                text = "\n".join(document.fields[self.human.json_key])
                for piece in cut(text, self.human.document_characters):
                    if left is not None:
                        left -= len(piece.encode())
                        if left < 0:
                            return
                    yield piece


def _refuse(line: BadLine) -> None:
    raise DataFormatError(str(line))


def _is_held_out(text: str, share: float) -> bool:
    """By content, so that a text that stands there twice is on one side only."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
    return number < share * _SHARES


def cut(text: str, size: int) -> Iterator[str]:
    """A text in pieces of at most ``size`` characters that end before white space where there is some."""
    start = 0
    while len(text) - start > size:
        space = max(
            text.rfind(" ", start + 1, start + size + 1), text.rfind("\n", start + 1, start + size + 1)
        )
        end = space if space > start else start + size
        yield text[start:end]
        start = end
    if text[start:].strip():
        yield text[start:]


@dataclass(frozen=True, eq=False)
class Tokenized(Cell):
    """A file of another cell as a dataset.

    Attributes:
        config: names the tokenizer.
        source: the cell that holds the file.
        file: its name there.
        tokenizer_fingerprint: of the tokenizer.
    """

    config: CollapseConfig
    source: Cell
    file: str
    tokenizer_fingerprint: str

    @property
    def parents(self) -> Sequence[Cell]:
        """The cell with the text."""
        return (self.source,)

    @property
    def settings(self) -> dict[str, Any]:
        """The file and the tokenizer."""
        return {"file": self.file, "tokenizer": self.tokenizer_fingerprint}

    def texts(self, store: Store) -> Path:
        """The text that the dataset was made from."""
        return store.place(self.source) / self.file

    def make(self, bench: Bench) -> dict[str, Any]:
        """Tokenize."""
        words = ("--input", self.texts(bench.store), *tokenizer_words(self.config))
        bench.tool("preprocess_edit", *words, "--edit-strategy", "none", *_output(bench))
        return {"num_tokens": IndexedDataset(str(bench.place / PREFIX)).num_tokens}


def tokenizer_words(config: CollapseConfig) -> tuple[str, ...]:
    """Flags that every preprocessing has."""
    tokenizer = config.tokenizer
    return ("--tokenizer-type", tokenizer.type, "--tokenizer-model", tokenizer.model, "--append-eod")


def _output(bench: Bench) -> tuple[object, ...]:
    threads = bench.commands.threads
    return ("--output-prefix", bench.place / "corpus", "--workers", threads, "--quiet")


@dataclass(frozen=True, eq=False)
class SyntheticText(Cell):
    """One text of a model for every text of another corpus, from its first words.

    Attributes:
        config: how it is sampled.
        model: writes.
        human: gives the first words.
        seed: of the samples.
    """

    config: CollapseConfig
    model: Model
    human: HumanText
    seed: int

    @property
    def parents(self) -> Sequence[Cell]:
        """The model and the human text."""
        return (self.model, self.human)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the sampling."""
        return {"seed": self.seed} | self.config.synthesis.model_dump(exclude={"batch_size"})

    def make(self, bench: Bench) -> dict[str, Any]:
        """Write the prompts, have them continued, keep the texts."""
        how = self.config.synthesis
        lines = (bench.store.place(self.human) / TEXTS).read_bytes().splitlines()
        prompts = [first_words(orjson.loads(line)["text"], how.prompt_words) for line in lines]
        prompt_file = bench.place / "prompts.jsonl"
        atomic_write_bytes(prompt_file, b"".join(orjson.dumps({"prompt": text}) + b"\n" for text in prompts))
        written = bench.place / "written.jsonl"
        context = int(self.config.run["model"]["seq_length"])
        given = {"--top-k": how.top_k, "--top-p": how.top_p}
        bench.tool(
            *("generate", "--checkpoint", bench.store.place(self.model) / RUN, "--prompt-file", prompt_file),
            *("--max-new-tokens", how.max_new_tokens or context, "--temperature", how.temperature),
            *(word for flag, value in given.items() if value is not None for word in (flag, value)),
            *("--seed", self.seed, "--batch-size", how.batch_size, "--output", written, "--quiet"),
        )
        records = [orjson.loads(line) for line in written.read_bytes().splitlines()]
        atomic_write_bytes(
            bench.place / TEXTS, b"".join(orjson.dumps({"text": r["text"]}) + b"\n" for r in records)
        )
        ended = sum(record["finish"] == "eod" for record in records)
        return {
            "num_texts": len(records),
            "ended_by_the_model": ended,
            "num_new_tokens": sum(record["num_new_tokens"] for record in records),
        }


def first_words(text: str, count: int) -> str:
    """The first ``count`` words of a text, with the white space between them as it stands there."""
    place = 0
    for word in text.split(maxsplit=count)[:count]:
        place = text.index(word, place) + len(word)
    return text[:place]


@dataclass(frozen=True, eq=False)
class EditedText(Cell):
    """A corpus edited by a model; a text and a dataset like :class:`Tokenized`.

    Attributes:
        config: names the tokenizer.
        corpus: is edited.
        model: the prior.
        edit: settings of the edit.
        seed: of the samples.
    """

    config: CollapseConfig
    corpus: Corpus
    model: Model
    edit: dict[str, object]
    seed: int

    @property
    def parents(self) -> Sequence[Cell]:
        """What is edited, and by whom."""
        return (self.corpus, self.model)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the edit."""
        return {"seed": self.seed, "edit": self.edit}

    def texts(self, store: Store) -> Path:
        """The edited text."""
        return store.place(self) / TEXTS

    def make(self, bench: Bench) -> dict[str, Any]:
        """Edit, and decode what came out."""
        flags: list[object] = []
        for name, value in self.edit.items():
            flag = "--" + name.replace("_", "-")
            flags += [flag] if value is True else [] if value is False else [flag, value]
        bench.tool(
            *("preprocess_edit", "--input", self.corpus.texts(bench.store), *tokenizer_words(self.config)),
            *("--prior", bench.store.place(self.model) / RUN, "--seed", self.seed, *flags, *_output(bench)),
        )
        dataset = IndexedDataset(str(bench.place / PREFIX))
        tokenizer = load_tokenizer(self.config.tokenizer.type, self.config.tokenizer.model)
        lines = []
        for sequences in dataset.iter_documents():
            ids = np.concatenate([*sequences, np.empty(0, dataset.dtype)])
            text = tokenizer.decode(ids[:-1] if len(ids) and ids[-1] == tokenizer.eod else ids)
            lines.append(orjson.dumps({"text": text}) + b"\n")
        atomic_write_bytes(bench.place / TEXTS, b"".join(lines))
        statistics = orjson.loads((bench.place / f"{PREFIX}.stats.json").read_bytes())
        return {"num_tokens": dataset.num_tokens, "statistics": statistics}


Corpus = Tokenized | EditedText


@dataclass(frozen=True, eq=False)
class Model(Cell):
    """A model trained from scratch.

    Attributes:
        config: its settings.
        corpora: what it is trained on, each with its share of the samples; ``None``: by tokens.
        seed: of weights and data order.
    """

    config: CollapseConfig
    corpora: tuple[tuple[Corpus, float | None], ...]
    seed: int

    @property
    def parents(self) -> Sequence[Cell]:
        """The corpora."""
        return [corpus for corpus, _ in self.corpora]

    @property
    def settings(self) -> dict[str, Any]:
        """Of the run."""
        shares = [share for _, share in self.corpora]
        return {"seed": self.seed, "run": self.config.run, "shares": shares}

    def make(self, bench: Bench) -> dict[str, Any]:
        """Train."""
        sources = []
        for index, (corpus, share) in enumerate(self.corpora):
            weight = float(bench.result(corpus)["num_tokens"]) if share is None else share
            prefix = str(bench.store.place(corpus) / PREFIX)
            sources.append({"name": f"corpus{index}", "prefix": prefix, "weight": weight})
        tree = self.config.run_config(str(bench.place / RUN), self.seed, sources)
        path = bench.place / "run.yaml"
        atomic_write_bytes(path, yaml.safe_dump(tree, sort_keys=False).encode())
        words = ("train", "--config", path, "--quiet")
        if self.config.processes == 1:
            bench.tool(*words)
        else:
            launcher = ("-m", "torch.distributed.run", "--standalone")
            bench.run_python(
                *launcher, "--nproc-per-node", self.config.processes, "-m", "megatron_tokedit.cli", *words
            )
        lines = (bench.place / RUN / "metrics.jsonl").read_bytes().splitlines()
        losses = [record["loss"] for line in lines if (record := orjson.loads(line))["kind"] == "train"]
        return {"train_loss": losses[-1]}


@dataclass(frozen=True, eq=False)
class Perplexity(Cell):
    """Held-out perplexity of a model by domain.

    Attributes:
        model: which.
        held_out: domain -> its dataset.
    """

    model: Model
    held_out: dict[str, Tokenized]

    @property
    def parents(self) -> Sequence[Cell]:
        """The model and the domains' datasets."""
        return (self.model, *self.held_out.values())

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The domains' names."""
        return {"domains": list(self.held_out)}

    def make(self, bench: Bench) -> dict[str, Any]:
        """Evaluate."""
        data = [f"{name}={bench.store.place(cell) / PREFIX}" for name, cell in self.held_out.items()]
        output = bench.place / "perplexity.json"
        checkpoint = bench.store.place(self.model) / RUN
        bench.tool(
            *("evaluate", "perplexity", "--checkpoint", checkpoint, "--data", *data),
            *("--output", output, "--quiet"),
        )
        table = orjson.loads(output.read_bytes())["table"]
        return {"perplexity": {row["domain"]: row["perplexity"][0] for row in table}}
