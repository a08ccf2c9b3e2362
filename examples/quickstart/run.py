"""The whole line on two CPU cores: text -> tokenizer -> prior -> edited corpus -> two models -> comparison.

    python examples/quickstart/run.py [--output-dir runs/quickstart] [--input my.jsonl]

Every stage is one of the project's own commands, printed before it runs, so that it can be repeated by hand.
All files stay below the output folder. A stage that is done is skipped when the script runs again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from collect import collect  # noqa: E402 - scripts beside each other, not a package
from report import write_report  # noqa: E402
from stages import PYTHON, ROOT, TOKENIZER_TYPE, Stages, run_command, train_tokenizer  # noqa: E402

ARMS = ("original", "edited")


def preprocess(prefix: Path, inputs: list[Path], model: Path, *flags: object) -> None:
    """Run tools/preprocess_edit.py."""
    run_command(
        *(PYTHON, "tools/preprocess_edit.py", "--input", *inputs, "--output-prefix", prefix),
        *("--tokenizer-type", TOKENIZER_TYPE, "--tokenizer-model", model, "--append-eod", *flags),
    )


def train(config: str, ranks: int, *overrides: str) -> None:
    """Run tools/train.py under torchrun."""
    torchrun = [PYTHON, "-m", "torch.distributed.run"]
    run_command(
        *(*torchrun, "--standalone", "--nproc-per-node", ranks, "tools/train.py"),
        *("--config", HERE.relative_to(ROOT) / config, *overrides),
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument(
        "--input", type=Path, help="your own text: jsonl with 'text' (and 'domain') keys, or txt"
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=700_000,
        help="text kept of a domain for the prior and for training (0: all)",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps on little text: does everything work here?"
    )
    return parser.parse_args()


def main() -> None:
    """Run all stages."""
    arguments = parse_arguments()
    if arguments.input is not None and not arguments.input.is_file():
        raise SystemExit(f"no such file: {arguments.input}")
    start = time.monotonic()
    user_input = arguments.input.resolve() if arguments.input else None
    out = arguments.output_dir.resolve()
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    os.chdir(ROOT)  # so that the commands below read as they would be typed there
    stages = Stages(out)
    corpus, data, edited = out / "corpus", out / "data", out / "edited"
    model_file = out / "tokenizer" / "tokenizer.model"
    max_bytes = 40_000 if arguments.smoke else arguments.max_bytes
    vocab_size = 512 if arguments.smoke else 2048
    short = ["training.train_steps=4", "schedule.lr_warmup_steps=1"] if arguments.smoke else []
    tokenizer = f"tokenizer.model={model_file}"

    stamp = [str(user_input), user_input.stat().st_mtime_ns if user_input else sys.version, max_bytes]
    counts = stages.run("1-collect-text", stamp, [corpus], lambda: collect(corpus, user_input, max_bytes))
    for domain, parts in counts.items():
        print(
            f"  {domain:12s}",
            *(f"{p} {c['documents']} documents {c['bytes'] / 1e6:.2f} MB " for p, c in parts.items()),
        )
    left_out = sum(c["left_out_documents"] for parts in counts.values() for c in parts.values())
    if left_out:
        print(f"  {left_out} documents left out to keep this short (--max-bytes 0 takes all)")

    texts = [corpus / "prior.jsonl", corpus / "train.jsonl"]
    stages.run(
        "2-train-tokenizer",
        vocab_size,
        [model_file.parent],
        lambda: train_tokenizer(texts, model_file.parent, vocab_size),
    )

    def make_plain_datasets() -> None:
        for name in ("prior", "train", *(f"heldout-{domain}" for domain in counts)):
            target = data / ("original" if name == "train" else name)
            preprocess(target, [corpus / f"{name}.jsonl"], model_file, "--edit-strategy", "none", "--quiet")

    stages.run("3-tokenize", "", [data], make_plain_datasets)
    prior_config = (HERE / "prior.yaml").read_text()
    prior_data = f"data.train.0.prefix={data}/prior_text_document"
    stages.run(
        "4-train-prior",
        [prior_config, short],
        [out / "prior"],
        lambda: train("prior.yaml", 2, f"run_dir={out}/prior", tokenizer, prior_data, *short),
    )
    stages.run(
        "5-edit-corpus",
        "up_revise",
        [edited],
        lambda: preprocess(edited / "edited", [corpus / "train.jsonl"], model_file, "--prior", out / "prior"),
    )
    for number, arm in enumerate(ARMS, start=6):
        folder = edited if arm == "edited" else data
        source = [f"data.train.0.name={arm}", f"data.train.0.prefix={folder}/{arm}_text_document"]
        stages.run(
            f"{number}-train-on-{arm}",
            [(HERE / "model.yaml").read_text(), short],
            [out / f"model-{arm}"],
            lambda arm=arm, source=source: train(
                "model.yaml", 2, f"run_dir={out}/model-{arm}", tokenizer, *source, *short
            ),
        )
    stages.run(
        "8-evaluate",
        list(counts),
        [out / "perplexity.json"],
        lambda: run_command(
            *(PYTHON, "tools/evaluate.py", "perplexity"),
            *("--checkpoint", *(out / f"model-{arm}" for arm in ARMS)),
            *("--data", *(f"{domain}={data}/heldout-{domain}_text_document" for domain in counts)),
            *("--output", out / "perplexity.json"),
            threads=os.cpu_count() or 1,
        ),
    )
    print(write_report(out, ARMS, stages.seconds))
    print(f"\n{time.monotonic() - start:.0f} s in all. Every file is in {out}")


if __name__ == "__main__":
    main()
