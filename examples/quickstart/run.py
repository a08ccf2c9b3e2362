"""The whole line on two CPU cores: text -> tokenizer -> prior -> edited corpus -> two models -> comparison.

    python examples/quickstart/run.py [--output-dir runs/quickstart] [--input my.jsonl]

Every stage is one of the project's own commands, printed before it runs, so that it can be repeated by hand.
All files stay below the output folder. A stage that is done is skipped when the script runs again; a stage
whose settings or predecessors changed is made anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from collect import collect
from report import write_report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOKENIZER_TYPE = "SentencePieceTokenizer"
PYTHON = os.path.relpath(sys.executable, ROOT) if sys.prefix.startswith(str(ROOT)) else sys.executable
ARMS = ("original", "edited")


class Stages:
    """Runs named stages once: a stage is done when its record holds the same settings and the same past."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "stages"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.past = ""
        self.seconds: dict[str, float] = {}

    def run(self, name: str, settings: object, outputs: list[Path], action: Callable[[], object]) -> object:
        """Run ``action`` unless it is done; what it returns (JSON) is kept and returned."""
        key = hashlib.sha256(json.dumps([name, settings, self.past]).encode()).hexdigest()
        self.past = key
        record_path = self.folder / f"{name}.json"
        record = json.loads(record_path.read_text()) if record_path.exists() else {}
        if record.get("key") == key:
            print(f"\n=== {name}: done ({record['seconds']:.0f} s, earlier)", flush=True)
            self.seconds[name] = record["seconds"]
            return record["result"]
        if record.get("key_started") != key:  # other settings: what a former run left does not count
            for path in outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            record_path.write_text(json.dumps({"key_started": key}))
        print(f"\n=== {name}", flush=True)
        start = time.monotonic()
        result = action()
        self.seconds[name] = time.monotonic() - start
        record = {"key": key, "key_started": key, "seconds": self.seconds[name], "result": result}
        partial = record_path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1))
        partial.rename(record_path)
        return result


def run_command(*words: object, threads: int = 1) -> None:
    """Print a command as it could be typed, run it from the project's root, stop where it fails."""
    argv = [str(word) for word in words]
    print("$ " + shlex.join(argv), flush=True)
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    status = subprocess.run(argv, env=environment, check=False).returncode
    if status:
        raise SystemExit(
            f"the command above failed with exit code {status}; `make quickstart` goes on from here"
        )


def train_tokenizer(corpus: list[Path], folder: Path, vocab_size: int) -> dict:
    """A sentencepiece BPE with byte fallback and no normalisation, so that decoding is lossless."""
    import orjson
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    texts = (orjson.loads(line)["text"] for path in corpus for line in path.open("rb"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(piece for text in texts for piece in text.splitlines(keepends=True)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        max_sentence_length=100_000,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return {"vocab_size": processor.get_piece_size()}


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
