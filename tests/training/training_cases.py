"""A tiny run on disk (datasets and configuration) and what ranks do with it; importable by the rank pool."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset import (
    IndexedDatasetWriter,
    Manifest,
    TokenizerRecord,
    best_dtype,
    sha256_of_file,
    write_manifest,
)

VOCAB_SIZE = 97
SPEC = {
    "type": "SentencePieceTokenizer",
    "model": "tiny.model",
    "vocab_size": VOCAB_SIZE,
    "eod": 2,
    "fingerprint": "f" * 64,
}

RUN = """
run_dir: {folder}/run
seed: 7
tokenizer: {{type: SentencePieceTokenizer, model: tiny.model}}
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  num_query_groups: 2
  ffn_hidden_size: 64
  seq_length: 16
  make_vocab_size_divisible_by: 16
precision: {{recipe: fp32}}
optimizer: {{lr: 1e-2, min_lr: 1e-3}}
schedule: {{lr_warmup_steps: 2}}
training: {{train_steps: 10, micro_batch_size: 2, global_batch_size: 8, eval_interval_steps: 5}}
data:
  train:
    - {{name: first, prefix: {folder}/first, weight: 3}}
    - {{name: second, prefix: {folder}/second}}
  validation:
    - {{name: held, prefix: {folder}/held}}
checkpoint: {{save_interval_steps: 5}}
logging: {{log_interval_steps: 5, peak_tflops: 0.1}}
"""


def write_dataset(
    prefix: str | Path,
    *,
    num_documents: int = 60,
    seed: int = 0,
    manifest: bool = True,
    largest_id: int = VOCAB_SIZE,
) -> None:
    """Random documents in which every id is its predecessor plus one, mostly: there is something to learn."""
    random = np.random.default_rng(seed)
    prefix = str(prefix)
    with IndexedDatasetWriter(prefix, best_dtype(VOCAB_SIZE)) as writer:
        for _ in range(num_documents):
            steps = np.where(random.random(int(random.integers(5, 60))) < 0.9, 1, random.integers(1, 50))
            writer.add_document(
                [np.append((random.integers(largest_id) + steps.cumsum()) % (largest_id - 3) + 3, 2)]
            )
        writer.finalize()
    if manifest:
        write_manifest(
            prefix,
            Manifest(
                versions={},
                inputs=[],
                json_key="text",
                tokenizer=TokenizerRecord(**SPEC),
                append_eod=True,
                dtype="uint16",
                counts={},
                checksums={part: sha256_of_file(f"{prefix}.{part}") for part in ("bin", "idx")},
            ),
        )


def write_run(folder: Path) -> Path:
    """Datasets and a configuration; returns the YAML file."""
    for seed, name in enumerate(("first", "second", "held")):
        write_dataset(folder / name, seed=seed)
    path = folder / "run.yaml"
    path.write_text(RUN.format(folder=folder))
    return path


def load(path: Path, *overrides: str) -> RunConfig:
    return load_config(path, overrides)


def train_on_rank(
    path: Path, overrides: tuple[str, ...] = (), spec: dict[str, Any] = SPEC, kill_at: int | None = None
) -> Any:
    """Train; returns the result and this rank's weights (the losses of every step are in metrics.jsonl)."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # saves fork
    multiprocessing.set_start_method("fork", force=True)  # of loader workers; a spawned rank would spawn
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.training.trainer import Trainer, resolve

    config = resolve(load(path, *overrides), vocab_size=spec["vocab_size"])
    ctx = initialize(config.parallel, seed=config.seed, device="cpu", cpu_threads=1)
    trainer = Trainer(config, ctx, spec, _Kill(kill_at) if kill_at else None)
    result = trainer.run()
    weights = []
    if hasattr(trainer, "model"):
        weights = [parameter.detach().clone() for chunk in trainer.model for parameter in chunk.parameters()]
    return result, [weight.float().numpy() for weight in weights]


class _Kill:
    """A progress bar that sends this process SIGTERM when a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, step: int, loss: float) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted_in_validation(path: Path, overrides: tuple[str, ...] = ()) -> Any:
    """Train; rank 0 gets SIGUSR1 before its second validation batch."""
    from megatron_tokedit.training import validation

    whole, batches = validation.evaluate_loss, iter(range(1000))

    def evaluate_loss(*args: Any, **kwargs: Any) -> Any:
        if next(batches) == 1 and kwargs.get("votes") and args[2].rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return whole(*args, **kwargs)

    validation.evaluate_loss = evaluate_loss  # type: ignore[assignment]
    try:
        return train_on_rank(path, overrides)
    finally:
        validation.evaluate_loss = whole


def interrupted_at_start(path: Path) -> str:
    """A signal while the datasets are opened; returns what came out of training."""
    from megatron_tokedit.training import trainer
    from megatron_tokedit.training.signals import StopNow

    whole = trainer.open_data

    def open_data(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args, **kwargs)

    trainer.open_data = open_data
    try:
        train_on_rank(path)
    except StopNow as stop:
        return str(stop)
    finally:
        trainer.open_data = whole
    return "trained"
