"""What the examples share: stages that run once, commands that are shown before they run, a tokenizer.

A stage that is done is skipped when a script runs again; a stage whose settings or predecessors changed is
made anew.
"""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER_TYPE = "SentencePieceTokenizer"
PYTHON = os.path.relpath(sys.executable, ROOT) if sys.prefix.startswith(str(ROOT)) else sys.executable


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
            if not record and (foreign := [str(path) for path in outputs if path.exists()]):
                raise SystemExit(
                    f"{', '.join(foreign)}: there already, and not made by this script; give another folder"
                )
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
            f"the command above failed with exit code {status}; the same command goes on from here"
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
