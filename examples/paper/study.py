"""Continual pre-training on edited domain corpora, as in the paper (arXiv 2412.14689), for any model.

``run`` is the whole study, stage by stage; ``olmo_1b.py`` and ``llama3_8b.py`` say for which model. Every
stage is one of the project's own commands, printed before it runs; one that is done is skipped when the
script runs again, and a domain that is added later is done beside the others.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import orjson  # noqa: E402
import yaml  # noqa: E402
from report import write_report  # noqa: E402
from stages import PYTHON, ROOT, Stages, run_command  # noqa: E402
from toy import STAND_INS, write_published, write_stand_ins  # noqa: E402

DOMAINS = ("biomed", "finance", "math")
ARMS = ("original", "edited")
TENSOR = "tensor_model_parallel_size"
TOKENIZER_TYPE = "HuggingFaceTokenizer"
EDIT = {"edit-strategy": "up_revise", "edit-threshold": 0.99, "edit-sampler": "top_k", "edit-top-k": 8}
"""The paper's edit: p >= 0.99 is drawn again from the 8 best candidates, at the temperature 1.5 of the
authors' README, which is the preset's default."""
TOY_EDIT = {**EDIT, "edit-threshold": 0.2}
"""A toy model is hardly ever as sure as 0.99."""
TOY_SEQ_LENGTH = 128
TOY_ROWS = 4
TOY_OVERRIDES = (
    f"training.global_batch_size={TOY_ROWS}",
    "optimizer.lr=1e-3",
    "optimizer.min_lr=1e-4",
    "data.num_workers=0",
    "runtime.device=cpu",
)


@dataclass(frozen=True, slots=True)
class Model:
    """What a study is about.

    Attributes:
        name: of its output folder.
        family: of this project.
        config: run configuration beside this file.
        prior_flags: of tools/preprocess_edit.py, with GPUs.
    """

    name: str
    family: str
    config: str
    prior_flags: tuple[object, ...] = field(
        default=("--prior-dtype", "bfloat16", "--prior-batch-tokens", 16384)
    )

    @property
    def recipe(self) -> dict:
        """The run configuration as it stands in its file."""
        return yaml.safe_load((HERE / self.config).read_text())


def parse_arguments(model: Model, documentation: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="HF_FOLDER", help="the published model")
    for domain in DOMAINS:
        help_text = "jsonl or jsonl.gz with 'text' keys"
        parser.add_argument(f"--{domain}", nargs="+", type=Path, metavar="FILE", help=help_text)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/paper") / model.name)
    parser.add_argument(
        "--gpus", type=int, help="ranks of a training and of editing (default: 8; 2 for --smoke)"
    )
    parser.add_argument(
        "--heldout-bytes", type=int, default=4_000_000, help="text of a domain to evaluate on, about"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="also evaluate on lm-eval tasks"
    )
    parser.add_argument(
        "--include-path", nargs="+", default=[], type=Path, metavar="DIR", help="of task files"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a toy model and toy text on a CPU: does everything work here?"
    )
    parser.add_argument(
        "--toy-steps", type=int, default=120, help="with --smoke: steps the toy model was trained"
    )
    arguments = parser.parse_args()
    arguments.gpus = arguments.gpus or (2 if arguments.smoke else 8)
    given = [domain for domain in DOMAINS if getattr(arguments, domain)]
    if not arguments.smoke and not (arguments.model and given):
        parser.error("give --model and at least one of --biomed, --finance, --math; or --smoke")
    missing = [path for name in ("model", *given) for path in _paths(arguments, name) if not path.exists()]
    if missing:
        parser.error(f"no such file or folder: {', '.join(map(str, missing))}")
    return arguments


def _paths(arguments: argparse.Namespace, name: str) -> list[Path]:
    value = getattr(arguments, name)
    return value if isinstance(value, list) else [value] if value else []


class Study:
    """The stages, each a method; ``run`` has their order."""

    def __init__(self, model: Model, arguments: argparse.Namespace) -> None:
        self.model, self.arguments, self.smoke = model, arguments, arguments.smoke
        out = arguments.output_dir.resolve()
        self.out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
        given = [domain for domain in DOMAINS if getattr(arguments, domain)]
        self.domains = given or list(STAND_INS)
        self.inputs = {d: [path.resolve() for path in _paths(arguments, d)] for d in given}
        self.published = arguments.model.resolve() if arguments.model else self.out / "published"
        self.base = self.out / "base"
        self.seq_length = TOY_SEQ_LENGTH if self.smoke else model.recipe["model"]["seq_length"]
        self.check = ["--check"] if self.smoke else ["--check", "--check-dtype", "bfloat16"]
        self.dtype = [] if self.smoke else ["--dtype", "bfloat16"]
        os.chdir(ROOT)  # so that the commands read as they would be typed there
        self.stages = Stages(self.out)

    def torchrun(self, *words: object) -> None:
        """A command with a process a GPU."""
        run_command(
            *(PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", self.arguments.gpus),
            *words,
        )

    def make_toys(self) -> None:
        """With --smoke, what was not given: the published model, and text for the domains."""
        if not self.arguments.model:
            steps = self.arguments.toy_steps
            losses = self.stages.run(
                "0-published-toy",
                steps,
                [self.published],
                lambda: write_published(self.published, self.model.family, steps),
            )
            print("  a toy {0}: loss {first_loss:.2f} -> {last_loss:.2f}".format(self.model.family, **losses))
        if not self.inputs:
            folder = self.out / "text"
            made = self.stages.run(
                "0-toy-text", "", [folder], lambda: write_stand_ins(folder, self.domains, 80_000)
            )
            self.inputs = {domain: [Path(path)] for domain, path in made.items()}

    def convert(self) -> None:
        """Hugging Face -> Megatron; both score a text alike, or nothing is written."""
        stamp = [str(self.published), (self.published / "config.json").stat().st_mtime_ns, self.seq_length]
        self.stages.run(
            "1-convert",
            stamp,
            [self.base],
            lambda: run_command(
                *(PYTHON, "tools/convert_checkpoint.py", "--input", self.published, "--output", self.base),
                *("--seq-length", self.seq_length, *self.check, "--overwrite"),
            ),
        )

    def split(self, domain: str) -> None:
        """Hold some documents out, by a hash of each: they are neither edited nor trained on."""
        folder, paths = self.out / domain, self.inputs[domain]
        stamp = [[str(path), path.stat().st_mtime_ns] for path in paths]
        limit = 15_000 if self.smoke else self.arguments.heldout_bytes
        counts = self.stages.run(
            f"2-{domain}-hold-out", [stamp, limit], [folder], lambda: hold_out(folder, paths, limit)
        )
        print("  " + ", ".join(f"{part} {c['documents']} documents" for part, c in counts.items()))

    def preprocess(self, domain: str, part: str, source: str, *flags: object, parallel: bool = False) -> None:
        """tools/preprocess_edit.py: OUT/DOMAIN/PART_text_document from one of the two files."""
        start = self.torchrun if parallel else lambda *words: run_command(PYTHON, *words)
        start(
            *("tools/preprocess_edit.py", "--input", self.out / domain / f"{source}.jsonl"),
            *("--output-prefix", self.out / domain / part, "--tokenizer-type", TOKENIZER_TYPE),
            *("--tokenizer-model", self.base / "tokenizer", "--append-eod", *flags),
        )

    def tokenize(self, domain: str) -> None:
        """The original dataset and the held-out one, with the model's own tokenizer."""

        def both() -> None:
            for part, source in (("original", "train"), ("heldout", "heldout")):
                self.preprocess(domain, part, source, "--edit-strategy", "none", "--quiet")

        self.stages.run(f"3-{domain}-tokenize", "", [], both)

    def edit(self, domain: str) -> None:
        """The edited dataset: the model that is going to be trained is the prior."""
        settings = TOY_EDIT if self.smoke else EDIT
        flags: list[object] = [word for name, value in settings.items() for word in (f"--{name}", value)]
        flags += ["--prior", self.base]
        flags += ["--quiet"] if self.smoke else list(self.model.prior_flags)
        self.stages.run(
            f"4-{domain}-edit",
            settings,
            [],
            lambda: self.preprocess(domain, "edited", "train", *flags, parallel=not self.smoke),
        )

    def steps(self, domain: str) -> int:
        """Of one epoch of the original text; an edit of this kind leaves the length as it is."""
        stats = json.loads((self.out / domain / "original_text_document.stats.json").read_text())
        rows = TOY_ROWS if self.smoke else self.model.recipe["training"]["global_batch_size"]
        return max(2, stats["tokens"] // (rows * self.seq_length))

    def train(self, domain: str, arm: str) -> None:
        """Go on with one of the two datasets; the other gets the same steps, batches and schedule."""
        steps, folder = self.steps(domain), self.out / domain
        warmup = min(self.model.recipe["schedule"]["lr_warmup_steps"], steps // 3)
        overrides = [
            f"run_dir={folder}/run-{arm}",
            f"init_from.checkpoint={self.base}",
            f"tokenizer.model={self.base}/tokenizer",
            f"data.train=[{{name: {domain}-{arm}, prefix: {folder}/{arm}_text_document}}]",
            f"data.validation=[{{name: {domain}, prefix: {folder}/heldout_text_document}}]",
            f"training.train_steps={steps}",
            f"schedule.lr_warmup_steps={warmup}",
        ]
        if self.smoke:
            section = yaml.safe_load((self.base / "continue.yaml").read_text())["model"]
            replicas = self.arguments.gpus // self.model.recipe.get("parallel", {}).get(TENSOR, 1)
            overrides += [f"model={json.dumps(section)}", *TOY_OVERRIDES]
            overrides.append(f"training.micro_batch_size={max(1, TOY_ROWS // replicas)}")
        self.stages.run(
            f"5-{domain}-train-{arm}",
            [self.model.recipe, overrides],
            [folder / f"run-{arm}"],
            lambda: self.torchrun(
                "tools/train.py", "--config", (HERE / self.model.config).relative_to(ROOT), *overrides
            ),
        )

    def convert_back(self, domain: str, arm: str) -> None:
        """Megatron -> Hugging Face: a folder that AutoModelForCausalLM loads."""
        output = self.hugging_face(domain, arm)
        self.stages.run(
            f"6-{domain}-to-hugging-face-{arm}",
            str(output),
            [],
            lambda: run_command(
                *(PYTHON, "tools/convert_checkpoint.py", "--input", self.out / domain / f"run-{arm}"),
                *("--output", output, *self.check, "--overwrite"),
            ),
        )

    def hugging_face(self, domain: str, arm: str) -> Path:
        """The folder that comes out."""
        return self.out / "hf" / f"{domain}-{arm}"

    def evaluate(self, domain: str) -> None:
        """Held-out perplexity of both, and of the published model; others are compared with the first."""
        folders = [self.hugging_face(domain, "original"), self.published, self.hugging_face(domain, "edited")]
        output = self.out / domain / "perplexity.json"
        self.stages.run(
            f"7-{domain}-perplexity",
            "",
            [output],
            lambda: run_command(
                *(PYTHON, "tools/evaluate.py", "perplexity", "--checkpoint", *folders),
                *(
                    "--data",
                    f"{domain}={self.out}/{domain}/heldout_text_document",
                    "--output",
                    output,
                    *self.dtype,
                ),
            ),
        )

    def evaluate_tasks(self) -> None:
        """What the paper's tables have: scores of all folders on lm-eval's tasks, or on task files."""
        tasks, paths = self.arguments.tasks, self.arguments.include_path
        where = ("--include-path", *paths) if paths else ()
        folders = [self.published, *self.outcomes]
        self.stages.run(
            "8-tasks",
            [tasks, [str(path) for path in paths]],
            [self.out / "tasks.json"],
            lambda: run_command(
                *(PYTHON, "tools/evaluate.py", "tasks", "--checkpoint", *folders, "--tasks", *tasks, *where),
                *("--output", self.out / "tasks.json", *self.dtype),
            ),
        )

    @property
    def outcomes(self) -> list[Path]:
        """All that came out, as Hugging Face folders."""
        return [self.hugging_face(domain, arm) for domain in self.domains for arm in ARMS]


def read_documents(path: Path) -> Iterator[tuple[str, bytes]]:
    """(text, line) of a jsonl file, which may be compressed by gzip."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield orjson.loads(line)["text"], line.rstrip(b"\r\n") + b"\n"
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                raise SystemExit(
                    f"{path}:{number}: expected a JSON object with a 'text' key ({error!r})"
                ) from error


def hold_out(folder: Path, paths: list[Path], num_bytes: int) -> dict[str, dict[str, int]]:
    """``train.jsonl`` and ``heldout.jsonl``: about so many bytes, at most a tenth, by a hash of the text."""
    folder.mkdir(parents=True, exist_ok=True)
    share = min(0.1, num_bytes / max(1, sum(path.stat().st_size for path in paths)))
    counts = {part: {"documents": 0, "bytes": 0} for part in ("train", "heldout")}
    with (folder / "train.jsonl").open("wb") as train, (folder / "heldout.jsonl").open("wb") as heldout:
        for text, line in (found for path in paths for found in read_documents(path)):
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest()
            part = "heldout" if int.from_bytes(digest, "big") < share * 2**32 else "train"
            (heldout if part == "heldout" else train).write(line)
            counts[part]["documents"] += 1
            counts[part]["bytes"] += len(line)
    if not all(count["documents"] for count in counts.values()):
        raise SystemExit(
            f"{', '.join(map(str, paths))}: too few documents to hold some of them out: {counts}"
        )
    return counts


def run(model: Model, documentation: str | None) -> None:
    """The study."""
    arguments = parse_arguments(model, documentation)
    start = time.monotonic()
    study = Study(model, arguments)
    study.make_toys()
    study.convert()
    past = study.stages.past
    pasts = []
    for domain in study.domains:
        study.stages.past = past  # what a domain follows from is not the domain before it
        study.split(domain)
        study.tokenize(domain)
        study.edit(domain)
        for arm in ARMS:
            study.train(domain, arm)
            study.convert_back(domain, arm)
        study.evaluate(domain)
        pasts.append(study.stages.past)
    study.stages.past = "".join(pasts)
    if arguments.tasks:
        study.evaluate_tasks()
    print(write_report(study.out, study.domains, study.outcomes))
    print(f"\n{time.monotonic() - start:.0f} s in all; {study.out}/report.md has the tables")
