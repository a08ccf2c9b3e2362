"""What continual pre-training forgets, and what replay keeps: base domain -> new domain, with and without.

    python examples/continual/run.py --base literary=books/*.txt --new biomed=answers.jsonl

A small model is trained on the base domain. Then it goes on with the new domain, from the same checkpoint,
under a schedule that warms up and decays once more (``recipe.yaml``): once on new text alone, and for every
``--replay`` once with that share of base text in each batch. Held-out perplexity on both domains, before and
after, is the table at the end; ``report.md`` and ``forgetting.png`` hold it too.

Text files (``.txt``) are cut into documents of about ``--document-characters`` at paragraph ends; of
``.jsonl`` files each ``text`` is a document. Every stage is one of the project's own commands, printed before
it runs; one that is done is skipped when the script runs again.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import matplotlib  # noqa: E402
import orjson  # noqa: E402
from stages import PYTHON, ROOT, TOKENIZER_TYPE, Stages, run_command, train_tokenizer  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HELD_OUT = 26  # of 256
PARTS = ("train", "heldout")


def documents_of(path: Path, num_characters: int) -> Iterator[str]:
    """Documents of a text file or a jsonl file."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                yield orjson.loads(line)["text"]
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                raise SystemExit(
                    f"{path}:{number}: expected a JSON object with a 'text' key ({error!r})"
                ) from error
        return
    paragraphs: list[str] = []
    for paragraph in path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n\n"):
        paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= num_characters:
            yield "\n\n".join(paragraphs)
            paragraphs = []
    if paragraphs:
        yield "\n\n".join(paragraphs)


def write_corpus(folder: Path, domains: dict[str, list[Path]], max_bytes: int, num_characters: int) -> dict:
    """``NAME-train.jsonl`` and ``NAME-heldout.jsonl`` of each domain; a tenth is held out, by a hash."""
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, int]] = {}
    for name, paths in domains.items():
        counts[name] = dict.fromkeys(PARTS, 0)
        files = {part: (folder / f"{name}-{part}.jsonl").open("wb") for part in PARTS}
        for text in (text for path in paths for text in documents_of(path, num_characters)):
            data = text.encode()
            if not text.strip() or (max_bytes and sum(counts[name].values()) + len(data) > max_bytes):
                continue
            part = PARTS[hashlib.blake2b(data, digest_size=8).digest()[0] < HELD_OUT]
            files[part].write(orjson.dumps({"text": text}) + b"\n")
            counts[name][part] += len(data)
        for file in files.values():
            file.close()
        if not all(counts[name].values()):
            raise SystemExit(f"{name}: too little text to hold some of it out: {counts[name]}")
    return counts


def tokenize(prefix: Path, source: Path, model: Path) -> None:
    """Run tools/preprocess_edit.py without a prior."""
    run_command(
        *(PYTHON, "tools/preprocess_edit.py", "--input", source, "--output-prefix", prefix),
        *("--tokenizer-type", TOKENIZER_TYPE, "--tokenizer-model", model),
        *("--append-eod", "--edit-strategy", "none", "--quiet"),
    )


def train(config: str, ranks: int, *overrides: str) -> None:
    """Run tools/train.py under torchrun."""
    run_command(
        *(PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks),
        *("tools/train.py", "--config", (HERE / config).relative_to(ROOT), *overrides),
    )


def arm_name(replay: float) -> str:
    """Name of a continuation."""
    return f"replay-{replay:.0%}".replace("%", "") if replay else "no-replay"


def report(out: Path, arms: list[str], names: tuple[str, str]) -> str:
    """Write the table and the picture; return the table."""
    results = json.loads((out / "perplexity.json").read_text())
    checkpoints = [Path(entry["checkpoint"]).name for entry in results["checkpoints"]]
    values = {
        row["domain"]: dict(zip(checkpoints, row["perplexity"], strict=True)) for row in results["table"]
    }
    base, new = names
    lines = [
        f"| model | {base} (base) | change | {new} (new) | change |",
        "|---|---|---|---|---|",
    ]
    for arm in arms:
        cells = [arm]
        for name in names:
            before, after = values[name][arms[0]], values[name][arm]
            cells += [f"{after:.2f}", "" if arm == arms[0] else f"{after / before - 1:+.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    (out / "report.md").write_text(
        f"Held-out perplexity before and after continual pre-training.\n\n{table}\n"
    )

    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained")
    for axis, name, what in zip(axes, names, ("base: forgetting", "new: learning"), strict=True):
        heights = [values[name][arm] for arm in arms]
        axis.set_yscale("log")
        axis.axhline(heights[0], color="#4c566a", linewidth=0.8, linestyle=":")
        axis.vlines(arms, heights[0], heights, color="#bf616a", linewidth=2)
        axis.plot(arms, heights, "o", color="#4c566a")
        for arm, height in zip(arms, heights, strict=True):
            axis.annotate(f"{height:.1f}", (arm, height), (6, 4), textcoords="offset points", fontsize=8)
        axis.margins(x=0.15, y=0.15)
        axis.set_title(f"{name} ({what})", fontsize=10)
        axis.set_ylabel("held-out perplexity (log)")
        axis.tick_params(axis="x", labelrotation=20, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "forgetting.png", dpi=140)
    plt.close(figure)
    return table


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", required=True, metavar="NAME=FILE", help="FILEs and patterns")
    parser.add_argument("--new", nargs="+", required=True, metavar="NAME=FILE", help="FILEs and patterns")
    parser.add_argument("--replay", nargs="*", type=float, default=[0.1, 0.3], help="shares of base text")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/continual"))
    parser.add_argument("--max-bytes", type=int, default=4_000_000, help="text kept of a domain (0: all)")
    parser.add_argument("--document-characters", type=int, default=3000)
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks of a training")
    parser.add_argument("--smoke", action="store_true", help="a few steps: does everything work here?")
    arguments = parser.parse_args()
    for share in arguments.replay:
        if not 0.0 < share < 1.0:
            parser.error(f"--replay {share}: a share lies between 0 and 1")
    return arguments


def named_files(words: list[str]) -> tuple[str, list[Path]]:
    """``["NAME=FILE", "FILE", ...]`` as a name and files that exist."""
    name, _, first = words[0].partition("=")
    if not name or not first:
        raise SystemExit(f"{words[0]!r}: expected NAME=FILE")
    paths = []
    for word in (first, *words[1:]):  # a shell leaves NAME=*.txt as it is
        found = sorted(Path(path).resolve() for path in glob.glob(word) if Path(path).is_file())
        if not found:
            raise SystemExit(f"no such file: {word}")
        paths += found
    return name, paths


def main() -> None:
    """Run all stages."""
    arguments = parse_arguments()
    start = time.monotonic()
    (base, base_files), (new, new_files) = named_files(arguments.base), named_files(arguments.new)
    if base == new:
        raise SystemExit(f"both domains are named {base!r}")
    out = arguments.output_dir.resolve()
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    os.chdir(ROOT)  # so that the commands below read as they would be typed there
    stages = Stages(out)
    corpus, data, model_file = out / "corpus", out / "data", out / "tokenizer" / "tokenizer.model"
    domains = {base: base_files, new: new_files}
    max_bytes = 60_000 if arguments.smoke else arguments.max_bytes
    vocab_size = 512 if arguments.smoke else 2048
    short = ["training.train_steps=4", "schedule.lr_warmup_steps=1"] if arguments.smoke else []
    tokenizer = f"tokenizer.model={model_file}"
    stamp = [[str(path), path.stat().st_mtime_ns] for paths in domains.values() for path in paths]

    counts = stages.run(
        "1-collect-text",
        [stamp, [base, new], max_bytes, arguments.document_characters],
        [corpus],
        lambda: write_corpus(corpus, domains, max_bytes, arguments.document_characters),
    )
    for name, parts in counts.items():
        print(f"  {name:12s}", *(f"{part} {size / 1e6:.2f} MB " for part, size in parts.items()))
    stages.run(
        "2-train-tokenizer",
        vocab_size,
        [model_file.parent],
        lambda: train_tokenizer(
            [corpus / f"{n}-train.jsonl" for n in domains], model_file.parent, vocab_size
        ),
    )

    def tokenize_all() -> None:
        for name in domains:
            for part in PARTS:
                tokenize(data / f"{name}-{part}", corpus / f"{name}-{part}.jsonl", model_file)

    stages.run("3-tokenize", "", [data], tokenize_all)
    base_prefix, new_prefix = (f"{data}/{name}-train_text_document" for name in (base, new))
    stages.run(
        "4-train-base",
        [(HERE / "base.yaml").read_text(), short],
        [out / "base"],
        lambda: train(
            "base.yaml",
            arguments.ranks,
            *(f"run_dir={out}/base", tokenizer, f"data.train.0.prefix={base_prefix}", *short),
        ),
    )
    recipe = (HERE / "recipe.yaml").read_text()
    for share in (0.0, *arguments.replay):
        arm = arm_name(share)
        sources = [{"name": new, "prefix": new_prefix, "weight": 1.0 - share}]
        if share:
            sources.append({"name": base, "prefix": base_prefix, "weight": share})
        settings = [f"run_dir={out}/{arm}", f"init_from.checkpoint={out}/base", tokenizer]
        settings += [f"data.train={json.dumps(sources)}", *short]
        stages.run(
            f"5-continue-{arm}",
            [recipe, settings],
            [out / arm],
            lambda settings=settings: train("recipe.yaml", arguments.ranks, *settings),
        )
    arms = ["base", *(arm_name(share) for share in (0.0, *arguments.replay))]
    stages.run(
        "6-evaluate",
        arms,
        [out / "perplexity.json"],
        lambda: run_command(
            *(PYTHON, "tools/evaluate.py", "perplexity"),
            *("--checkpoint", *(out / arm for arm in arms)),
            *("--data", *(f"{name}={data}/{name}-heldout_text_document" for name in domains)),
            *("--output", out / "perplexity.json"),
            threads=os.cpu_count() or 1,
        ),
    )
    print("\n" + report(out, arms, (base, new)))
    print(f"\n{time.monotonic() - start:.0f} s in all. The table is in {out}/report.md, with forgetting.png")


if __name__ == "__main__":
    main()
