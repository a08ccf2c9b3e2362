"""How large the checks are: on a GPU, and on a CPU, where they only show that the script itself works."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the models, the text and the runs.

    Attributes:
        name: ``gpu`` or ``cpu``.
        vocab_size: of the tokenizer that is trained on the text.
        corpus_characters: of the text that is trained on.
        held_out_characters: of other text, which is edited.
        model: fields of the model that is trained.
        micro_batch_size: of the trained model.
        global_batch_size: of the trained model.
        learning_rate: of the trained model.
        train_steps: of a whole run.
        loss_window_steps: last steps that losses are compared over.
        first_steps: of a run, in which the loss has to fall.
        least_fall: by how much it has to fall, in nats, from the first steps to the last of them.
        save_step: where a run is saved, and resumed under other recipes.
        resumed_steps: steps after it.
        edit_threshold: of the edits by the trained model, low enough that there are many.
        rate_model: fields of the model whose speed is measured.
        rate_vocab_size: its vocabulary.
        rate_microbatches: microbatches a step.
        rate_steps: measured training steps, after two that are not.
        rate_documents: documents that are scored, each as long as the context.
        rate_batch_tokens: positions a forward of the prior.
    """

    name: str
    vocab_size: int
    corpus_characters: int
    held_out_characters: int
    micro_batch_size: int
    global_batch_size: int
    learning_rate: float
    train_steps: int
    loss_window_steps: int
    first_steps: int
    least_fall: float
    save_step: int
    resumed_steps: int
    edit_threshold: float
    rate_vocab_size: int
    rate_microbatches: int
    rate_steps: int
    rate_documents: int
    rate_batch_tokens: int
    model: dict[str, Any] = field(default_factory=dict)
    rate_model: dict[str, Any] = field(default_factory=dict)


GPU = Scale(
    name="gpu",
    vocab_size=2048,
    corpus_characters=1_200_000,
    held_out_characters=150_000,
    micro_batch_size=8,
    global_batch_size=16,
    learning_rate=1e-3,
    train_steps=200,
    loss_window_steps=20,
    first_steps=20,
    least_fall=0.5,
    save_step=100,
    resumed_steps=10,
    edit_threshold=0.3,
    rate_vocab_size=32000,
    rate_microbatches=2,
    rate_steps=8,
    rate_documents=24,
    rate_batch_tokens=16384,
    model={
        "family": "llama",
        "num_layers": 6,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 1408,
        "seq_length": 512,
    },
    rate_model={
        "family": "llama",
        "num_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_query_groups": 8,
        "ffn_hidden_size": 8192,
        "seq_length": 4096,
    },
)
CPU = Scale(
    name="cpu",
    vocab_size=400,
    corpus_characters=60_000,
    held_out_characters=6_000,
    micro_batch_size=4,
    global_batch_size=4,
    learning_rate=1e-2,
    train_steps=24,
    loss_window_steps=6,
    first_steps=20,
    least_fall=0.3,
    save_step=12,
    resumed_steps=6,
    edit_threshold=0.05,
    rate_vocab_size=400,
    rate_microbatches=1,
    rate_steps=2,
    rate_documents=4,
    rate_batch_tokens=256,
    model={
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 128,
        "seq_length": 64,
        "init_method_std": 0.08,
    },
    rate_model={
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 128,
        "seq_length": 128,
    },
)
SCALES = {scale.name: scale for scale in (GPU, CPU)}
