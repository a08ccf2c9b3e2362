"""Tiny conversations on disk, a fine-tuning configuration, and what ranks do with them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from training_cases import SPEC, VOCAB_SIZE, train_on_rank, write_dataset

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
from megatron_tokedit.dataset.loss_mask import loss_mask_prefix
from megatron_tokedit.dataset.manifest import ConversationRecord

ROW = 32
RUN = """
stage: sft
init_from: {{checkpoint: {base}/run}}
run_dir: {folder}/run
seed: 7
tokenizer: {{type: SentencePieceTokenizer, model: tiny.model}}
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  num_query_groups: 2
  ffn_hidden_size: 64
  seq_length: 32
  make_vocab_size_divisible_by: 16
precision: {{recipe: fp32}}
optimizer: {{lr: 5e-3, min_lr: 1e-3}}
training: {{train_epochs: 2, micro_batch_size: 1, global_batch_size: 4}}
data:
  train:
    - {{name: chats, prefix: {folder}/chats}}
    - {{name: more, prefix: {folder}/more}}
  validation:
    - {{name: held, prefix: {folder}/held}}
checkpoint: {{save_interval_steps: 5}}
logging: {{log_interval_steps: 5, peak_tflops: 0.1}}
"""
TEMPLATE = ConversationRecord(chat_template="{{ messages }}", chat_template_name="plain", format="messages")


def write_conversations(
    prefix: str | Path,
    conversations: list[tuple[list[int], list[int]]],
    *,
    manifest: bool = True,
    template: ConversationRecord | None = TEMPLATE,
    mask: bool = True,
) -> None:
    """Write (ids, loss mask) pairs, as ``tools/preprocess_edit.py --format sft`` does."""
    prefix = str(prefix)
    for where, dtype, part in ((prefix, best_dtype(VOCAB_SIZE), 0), (loss_mask_prefix(prefix), np.uint8, 1)):
        if part and not mask:
            continue
        with IndexedDatasetWriter(where, dtype) as writer:
            for pair in conversations:
                writer.add_document([np.array(pair[part])])
            writer.finalize()
    if manifest:
        checksums = {part: sha256_of_file(f"{prefix}.{part}") for part in ("bin", "idx")}
        write_manifest(
            prefix,
            Manifest(
                versions={}, inputs=[], json_key="sft", tokenizer=TokenizerRecord(**SPEC), append_eod=False,
                dtype="uint16", counts={}, checksums=checksums, conversation=template,
            ),
        )  # fmt: skip


def make_conversations(
    count: int, seed: int, longest: int = ROW + 1, shortest: int = 4
) -> list[tuple[list[int], list[int]]]:
    """Prompts of random ids, answered by counting on from their last id; the answer counts in the loss."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        size = int(random.integers(shortest, longest + 1))
        prompt = int(random.integers(1, size - 1))
        ids = random.integers(3, VOCAB_SIZE, size)
        ids[prompt:] = (ids[prompt - 1] + np.arange(1, size - prompt + 1)) % (VOCAB_SIZE - 3) + 3
        made.append((ids.tolist(), [0] * prompt + [1] * (size - prompt)))
    return made


def write_base(folder: Path) -> Path:
    """A configuration of a pretraining run that fine-tuning starts from."""
    write_dataset(folder / "text")
    text = RUN.format(base=folder, folder=folder)
    kept = [line for line in text.splitlines() if not line.startswith(("stage", "init_from"))]
    text = "\n".join(
        kept[: kept.index("data:")] + ["data:", f"  train: [{{name: t, prefix: {folder}/text}}]"]
    )
    path = folder / "base.yaml"
    path.write_text(text.replace("train_epochs: 2", "train_steps: 4"))
    return path


def write_sft(folder: Path, base: Path) -> Path:
    """Conversations and a configuration; returns the YAML file."""
    write_conversations(folder / "chats", make_conversations(37, seed=1))
    write_conversations(folder / "more", make_conversations(11, seed=2))
    write_conversations(folder / "held", make_conversations(9, seed=3))
    path = folder / "sft.yaml"
    path.write_text(RUN.format(base=base, folder=folder))
    return path


def load(path: Path, *overrides: str) -> RunConfig:
    return load_config(path, overrides)


def base_on_rank(path: Path, overrides: tuple[str, ...] = ()) -> None:
    """Train what fine-tuning starts from."""
    train_on_rank(path, overrides)


def sft_on_rank(
    path: Path,
    overrides: tuple[str, ...] = (),
    kill_at: int | None = None,
    kill_with: signal.Signals = signal.SIGTERM,
) -> Any:
    """Fine-tune; returns the result (the losses of every step are in metrics.jsonl)."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # saves fork
    multiprocessing.set_start_method("fork", force=True)
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.training.trainer import train

    config = load(path, *overrides)
    ctx = initialize(config.parallel, seed=config.seed, device="cpu", cpu_threads=1)
    return train(config, ctx, SPEC, progress=_Kill(kill_at, kill_with) if kill_at else None)


def weights_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """All weights of a checkpoint."""
    from megatron_tokedit.engine.streamed_checkpoint import StoredWeights

    stored = StoredWeights(checkpoint)
    return {name: stored.read(name).numpy() for name in stored.outline.parts}


class _Kill:
    """A progress bar that sends this process a signal when a step is done."""

    def __init__(self, step: int, kill_with: signal.Signals) -> None:
        self.step = step
        self.kill_with = kill_with

    def update(self, step: int, loss: float) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.kill_with)
