"""The sections of a training run's YAML file.

Fields that map to a megatron-core dataclass keep megatron-core's name. Invariant: a section checks only
itself; what involves two sections (sizes that must divide each other, and so on) is checked in
``config/validate.py`` so that all faults are reported together.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_tokedit.config.base import Section


class TokenizerConfig(Section):
    """The tokenizer that the data were written with and that the checkpoint records."""

    type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"]
    """Megatron-LM's name of the tokenizer type."""
    model: str = Field(min_length=1)
    """A sentencepiece ``.model`` file, or a Hugging Face tokenizer folder."""


class ModelConfig(Section):
    """A GPT model; names as in megatron-core's ``TransformerConfig`` and ``GPTModel``."""

    family: Literal["llama", "gpt2"] = "llama"
    """``llama``: RMSNorm, RoPE, SwiGLU, no biases. ``gpt2``: LayerNorm, learned positions, GELU, biases."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None
    """Key/value heads (GQA); default: as many as attention heads."""
    kv_channels: PositiveInt | None = None
    """Size of a head; default ``hidden_size / num_attention_heads``."""
    ffn_hidden_size: PositiveInt | None = None
    """Default: 4 x hidden_size for ``gpt2``; for ``llama`` 8/3 x hidden_size, up to a multiple of 64."""
    seq_length: PositiveInt
    """Training sequence length in tokens."""
    max_position_embeddings: PositiveInt | None = None
    """Number of learned positions (``gpt2``); default ``seq_length``."""
    rotary_base: PositiveInt = 10000
    norm_epsilon: PositiveFloat = 1e-5
    init_method_std: PositiveFloat = 0.02
    hidden_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    attention_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    share_embeddings_and_output_weights: bool | None = None
    """Tied embeddings; default: yes for ``gpt2``, no for ``llama``."""
    vocab_size: PositiveInt | None = None
    """Real vocabulary; default: the tokenizer's. The engine pads it; padding is never scored."""
    make_vocab_size_divisible_by: PositiveInt = 128

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Inner size of the MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.family == "gpt2":
            return 4 * self.hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def max_positions(self) -> int:
        """Longest sequence the model takes."""
        return self.max_position_embeddings or self.seq_length

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output layer uses the embedding's weight."""
        tied = self.share_embeddings_and_output_weights
        return self.family == "gpt2" if tied is None else tied

    def resolved(self, vocab_size: int | None = None) -> ModelConfig:
        """This model with every default that depends on another field filled in.

        Args:
            vocab_size: the tokenizer's vocabulary size, for a model that names none.
        """
        return self.model_copy(
            update={
                "num_query_groups": self.num_key_value_heads,
                "kv_channels": self.head_size,
                "ffn_hidden_size": self.ffn_size,
                "max_position_embeddings": self.max_positions,
                "share_embeddings_and_output_weights": self.ties_embeddings,
                "vocab_size": self.vocab_size or vocab_size,
            }
        )


class ParallelConfig(Section):
    """How the model is spread over ranks; the data-parallel size is what remains of the world size."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    distributed_timeout_minutes: PositiveInt = 30


class PrecisionConfig(Section):
    """A named precision recipe (``engine/precision.py`` documents each one's megatron-core fields)."""

    recipe: Literal["fp32", "bf16"] = "bf16"


class OptimizerConfig(Section):
    """AdamW; names as in megatron-core's ``OptimizerConfig``."""

    lr: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0)
    adam_eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""


class ScheduleConfig(Section):
    """The learning-rate schedule, in steps."""

    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_steps: NonNegativeInt = 0
    lr_decay_steps: PositiveInt | None = None
    """Step at which ``min_lr`` is reached; default: ``training.train_steps``."""


class TrainingConfig(Section):
    """How much is trained, in what batches."""

    train_steps: PositiveInt
    micro_batch_size: PositiveInt = 1
    global_batch_size: PositiveInt
    """Sequences a step over all data-parallel ranks; the rest is gradient accumulation."""
    eval_interval_steps: NonNegativeInt = 0
    """Validate every so many steps (0: only at the end)."""
    eval_steps: PositiveInt = 10
    """Global batches a validation source is measured on, at most (never more than one pass over it)."""


class SourceConfig(Section):
    """One dataset."""

    name: str = Field(min_length=1)
    prefix: str = Field(min_length=1)
    """Names ``PREFIX.bin`` and ``PREFIX.idx``. With ``input`` it ends in ``_KEY_document``, the name that
    ``tools/preprocess_edit.py`` writes under (KEY is ``text`` unless ``edit.json_keys`` says otherwise)."""
    weight: PositiveFloat = 1.0
    """Relative share of this source in the blend."""
    input: list[str] | None = Field(None, min_length=1)
    """Raw text files; ``tools/train.py`` makes the dataset from them if it is not there."""
    edit: dict[str, object] | None = None
    """Settings of ``tools/preprocess_edit.py`` for ``input``, under its flag names with underscores."""


class DataConfig(Section):
    """Training and validation sources. Relative paths start at the folder the command is run in."""

    train: list[SourceConfig] = Field(min_length=1)
    validation: list[SourceConfig] = Field(default_factory=list)
    """Each is measured on its own, under its name."""
    cache_dir: str | None = None
    """Index cache of megatron-core's dataset builders; default ``RUN_DIR/index_cache``."""
    num_workers: NonNegativeInt = 0
    """Data-loader processes a rank."""
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False


class CheckpointConfig(Section):
    """Saving and resuming."""

    save_interval_steps: NonNegativeInt = 0
    """Save every so many steps (0: only at the end)."""
    keep_last: NonNegativeInt = 0
    """Keep only the newest so many complete checkpoints (0: all)."""


class LoggingConfig(Section):
    """What is written where. TensorBoard and ``metrics.jsonl`` in the run folder are always written."""

    log_interval_steps: PositiveInt = 10
    peak_tflops: PositiveFloat | None = None
    """Peak rate of one device for MFU; default: known for the GPU, measured on a CPU (a matrix product)."""


class RuntimeConfig(Section):
    """The machine and the job: device, threads, when to stop."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: PositiveInt | None = None
    """torch threads a rank on CPU; default: usable cores / ranks on this node, at least 1."""
    exit_at_step: PositiveInt | None = None
    """Save a checkpoint and stop once this step is done; a rerun without it (or with a later one) goes on."""


class RunConfig(Section):
    """A whole training run."""

    stage: Literal["pretrain"] = "pretrain"
    run_dir: str = Field(min_length=1)
    """Folder of checkpoints, logs and the resolved config."""
    seed: NonNegativeInt = 1234
    tokenizer: TokenizerConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    data: DataConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    runtime: RuntimeConfig = RuntimeConfig()
