"""The paper's instruction tuning at toy size: one model on original and on edited responses, side by side.

    python examples/sft/run.py --instructions math=gsm8k.jsonl medicine=medquad.jsonl

A small model is pre-trained on plain text: what half of the training conversations say, and ``--base-text``.
It is the base of every fine-tuning and, as in the paper, the prior of the edit, so it has to know text of
this kind without having seen these responses: it scores every response of the other half given the
conversation before it, and tokens with p >= ``--threshold`` are drawn again. For every instruction set the
base is then fine-tuned twice with the same settings, on the original and on the edited responses of that
half; the table at the end is the perplexity of held-out responses (which are never edited), with the interval
of the difference. ``report.md`` and ``responses.png`` hold it too.

Instruction files are those of ``tools/preprocess_edit.py --format sft`` (JSON lines: prompt and response,
Alpaca, ShareGPT, messages). Every stage is one of the project's own commands, printed before it runs; one
that is done is skipped when the script runs again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import orjson  # noqa: E402
from stages import PYTHON, ROOT, TOKENIZER_TYPE, Stages, run_command, train_tokenizer  # noqa: E402

HELD_OUT, FOR_THE_BASE = 26, 141  # of 256: a tenth is held out, half of the rest is the base's text
PARTS = ("train", "base", "heldout")
ARMS = ("original", "edited")
TEMPLATE = "tulu"
SMOKE = ["training.train_steps=4", "schedule.lr_warmup_steps=1"]


def split_instructions(folder: Path, sets: dict[str, list[Path]], max_bytes: int) -> dict:
    """``NAME-PART.jsonl`` of each set, for fine-tuning, for the base and held out.

    A hash of a record's longest text decides, so that a passage or an answer is in one part only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, int]] = {}
    for name, paths in sets.items():
        lines: dict[str, list[bytes]] = {part: [] for part in PARTS}
        left = max_bytes or sys.maxsize
        for line in (line for path in paths for line in path.read_bytes().splitlines() if line.strip()):
            left -= len(line)
            if left < 0:
                break
            longest = max(strings_of(orjson.loads(line)), key=len, default="")
            place = hashlib.blake2b(" ".join(longest.split()).encode(), digest_size=8).digest()[0]
            part = "heldout" if place < HELD_OUT else "base" if place < FOR_THE_BASE else "train"
            lines[part].append(line)
        counts[name] = {part: len(found) for part, found in lines.items()}
        if not all(counts[name].values()):
            raise SystemExit(f"{name}: too few records to hold some out: {counts[name]}")
        for part, found in lines.items():
            (folder / f"{name}-{part}.jsonl").write_bytes(b"\n".join(found) + b"\n")
    return counts


def strings_of(value: object) -> list[str]:
    """All strings of a record, in order; roles and names are short and do no harm to a tokenizer."""
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in values for text in strings_of(part)]


def write_plain_text(path: Path, files: list[Path], conversations: list[Path], max_bytes: int = 0) -> dict:
    """A document a run of paragraphs of the files, ``max_bytes`` in all (0: no limit), and a conversation."""
    documents: list[str] = []
    for file in files:
        paragraphs = file.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n\n")
        for start in range(0, len(paragraphs), 8):
            documents.append("\n\n".join(paragraphs[start : start + 8]))
    if max_bytes:
        ends = itertools.accumulate(len(text.encode()) for text in documents)
        documents = [text for text, end in zip(documents, ends, strict=True) if end <= max_bytes]
    for file in conversations:
        documents += ["\n".join(strings_of(orjson.loads(line))) for line in file.open("rb")]
    kept = [text for text in documents if text.strip()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in kept))
    return {"documents": len(kept)}


def preprocess(prefix: Path, source: Path, model: Path, *words: object) -> None:
    """Run tools/preprocess_edit.py."""
    run_command(
        *(PYTHON, "tools/preprocess_edit.py", "--input", source, "--output-prefix", prefix),
        *("--tokenizer-type", TOKENIZER_TYPE, "--tokenizer-model", model, *words, "--quiet"),
        threads=1,
    )


def train(config: str, *overrides: str) -> None:
    """Run tools/train.py."""
    run_command(
        *(PYTHON, "tools/train.py", "--config", (HERE / config).relative_to(ROOT), *overrides, "--quiet"),
        threads=os.cpu_count() or 1,
    )


def report(out: Path, sets: list[str]) -> str:
    """Write the table and the picture; return the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = ("instruction set", "held out", "eligible", "changed", "base", *ARMS, "change (95 % interval)")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    changed: dict[str, int] = {}
    figure, axes = plt.subplots(figsize=(7, 1 + 0.7 * len(sets)), layout="constrained")
    for place, name in enumerate(sets):
        results = json.loads((out / f"{name}.json").read_text())
        values = dict(zip(("base", *ARMS), results["table"][0]["perplexity"], strict=True))
        edit = json.loads((out / "data" / name / "edited_sft_document.stats.json").read_text())["edit"]
        changed[name] = edit["changed"]
        held_out = json.loads((out / "data" / name / "heldout_sft_document.stats.json").read_text())
        num_held_out = held_out["documents"]["out"]
        shares = [edit[what] / max(edit["scored"], 1) for what in ("eligible", "changed")]
        (token,) = (
            row["token"]
            for comparison in results["comparisons"]
            if comparison["checkpoint"] == f"{name}-edited"
            for row in comparison["rows"]
            if row["domain"] == name
        )
        low, high = token["change_percent_interval"] or (float("nan"),) * 2
        lines.append(
            f"| {name} | {num_held_out} | {shares[0]:.2%} | {shares[1]:.2%} | "
            + " | ".join(f"{values[arm]:.3f}" for arm in ("base", *ARMS))
            + f" | {token['change_percent']:+.2f} % ({low:+.2f} to {high:+.2f}) |"
        )
        change = token["change_percent"]
        bar = [[change - low], [high - change]]
        axes.errorbar([change], [place], xerr=bar, marker="o", capsize=3, color="#5e81ac")
    axes.axvline(0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(sets)), sets)
    axes.set_ylim(len(sets) - 0.5, -0.5)
    axes.set_xlabel("perplexity of held-out responses: edited against original (%, 95 % interval)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "responses.png", dpi=140)
    plt.close(figure)
    table = "\n".join(lines)
    if untouched := [name for name in sets if not changed[name]]:
        table += f"\n\nThe base is sure of too little in {', '.join(untouched)}: nothing was changed there."
    (out / "report.md").write_text(f"Perplexity of held-out responses.\n\n{table}\n")
    return table


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instructions", nargs="+", required=True, metavar="NAME=FILE.jsonl")
    parser.add_argument(
        *("--keys",), nargs="*", default=[], metavar="NAME:PART=KEY", help="as --sft-keys, for one set"
    )
    parser.add_argument(
        "--base-text",
        nargs="*",
        type=Path,
        default=[],
        metavar="FILE.txt",
        help="plain text for the base too",
    )
    parser.add_argument("--threshold", type=float, default=0.99, help="of the edit")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/sft"))
    parser.add_argument(
        "--max-bytes", type=int, default=1_000_000, help="of each set, and of the base text (0: all)"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps: does everything work here?")
    arguments = parser.parse_args()
    names = [word.partition("=")[0] for word in arguments.instructions]
    if len(set(names)) < len(names) or not all("=" in word for word in arguments.instructions):
        parser.error("--instructions: expected NAME=FILE, each NAME once")
    if "base" in names:
        parser.error("--instructions: base is the name of the base's own text; take another")
    if unknown := {word.partition(":")[0] for word in arguments.keys} - set(names):
        parser.error(f"--keys: no instruction set is named {', '.join(sorted(unknown))}")
    return arguments


def main() -> None:
    """Run all stages."""
    arguments = parse_arguments()
    start = time.monotonic()
    sets = {
        name: [Path(path).resolve()] for name, _, path in (w.partition("=") for w in arguments.instructions)
    }
    base_files = [path.resolve() for path in arguments.base_text]
    for path in (*base_files, *(path for paths in sets.values() for path in paths)):
        if not path.is_file():
            raise SystemExit(f"no such file: {path}")
    keys = {name: [w.partition(":")[2] for w in arguments.keys if w.startswith(f"{name}:")] for name in sets}
    out = arguments.output_dir.resolve()
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    os.chdir(ROOT)  # so that the commands below read as they would be typed there
    stages = Stages(out)
    text, data, model_file = out / "text", out / "data", out / "tokenizer" / "tokenizer.model"
    max_bytes = 400_000 if arguments.smoke else arguments.max_bytes
    short = SMOKE if arguments.smoke else []
    stamp = [[str(path), path.stat().st_mtime_ns] for path in base_files]
    stamp += [[str(path), path.stat().st_mtime_ns] for paths in sets.values() for path in paths]

    def collect() -> dict:
        counts = split_instructions(text, sets, max_bytes)
        conversations = [text / f"{name}-base.jsonl" for name in sets]
        counts["base"] = write_plain_text(text / "base.jsonl", base_files, conversations, max_bytes)
        return counts

    for name, counts in stages.run("1-collect", [stamp, list(sets), max_bytes], [text], collect).items():
        print(f"  {name:12s}", *(f"{count:,} {what} " for what, count in counts.items()))

    def make_tokenizer() -> dict:
        strings = text / "tokenizer.jsonl"
        write_plain_text(strings, [], [text / "base.jsonl", *(text / f"{n}-train.jsonl" for n in sets)])
        return train_tokenizer([strings], model_file.parent, 512 if arguments.smoke else 2048)

    stages.run("2-train-tokenizer", arguments.smoke, [model_file.parent], make_tokenizer)
    stages.run(
        "3-tokenize-base",
        "",
        [data / "base"],
        lambda: preprocess(
            data / "base" / "base", text / "base.jsonl", model_file, "--edit-strategy", "none", "--append-eod"
        ),
    )
    tokenizer = f"tokenizer.model={model_file}"
    base = [f"run_dir={out}/base", tokenizer, f"data.train.0.prefix={data}/base/base_text_document", *short]
    stages.run(
        "4-train-base",
        [(HERE / "base.yaml").read_text(), base],
        [out / "base"],
        lambda: train("base.yaml", *base),
    )
    recipe = (HERE / "sft.yaml").read_text()
    for name in sets:
        chat = ["--format", "sft", "--sft-chat-template", TEMPLATE]
        chat += ["--sft-keys", *keys[name]] if keys[name] else []
        chat += ["--sft-max-tokens", "512"]  # a row of the fine-tuning, and the prior's context
        edit = ["--prior", out / "base", "--edit-threshold", arguments.threshold]

        def make_data(name: str = name, chat: list = chat, edit: list = edit) -> None:
            plain = [*chat, "--edit-strategy", "none"]
            preprocess(data / name / "heldout", text / f"{name}-heldout.jsonl", model_file, *plain)
            preprocess(data / name / "original", text / f"{name}-train.jsonl", model_file, *plain)
            preprocess(data / name / "edited", text / f"{name}-train.jsonl", model_file, *chat, *edit)

        stages.run(f"5-edit-{name}", [keys[name], arguments.threshold], [data / name], make_data)
        for arm in ARMS:
            settings = [f"run_dir={out}/{name}-{arm}", f"init_from.checkpoint={out}/base", tokenizer]
            settings += [f"data.train.0.prefix={data}/{name}/{arm}_sft_document"]
            settings += ["training.train_epochs=null", *short] if short else []
            stages.run(
                f"6-tune-{name}-{arm}",
                [recipe, settings],
                [out / f"{name}-{arm}"],
                lambda settings=settings: train("sft.yaml", *settings),
            )
        stages.run(
            f"7-evaluate-{name}",
            "",
            [out / f"{name}.json"],
            lambda name=name: run_command(
                *(PYTHON, "tools/evaluate.py", "perplexity", "--checkpoint", out / "base"),
                *(out / f"{name}-{arm}" for arm in ARMS),
                *("--baseline", f"{name}-original", "--data", f"{name}={data}/{name}/heldout_sft_document"),
                *("--output", out / f"{name}.json"),
                threads=os.cpu_count() or 1,
            ),
        )
    print("\n" + report(out, list(sets)))
    print(f"\n{time.monotonic() - start:.0f} s in all. The table is in {out}/report.md, with responses.png")


if __name__ == "__main__":
    main()
