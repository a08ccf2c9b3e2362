"""Models whose every probability is known, behind the same decoder protocol; and what ranks run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_tokedit.generation import TextModel
from megatron_tokedit.tokenizers import load_tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
TOKENIZERS = {
    "sentencepiece": ("SentencePieceTokenizer", str(DATA / "tiny_sentencepiece.model")),
    "byte level": ("HuggingFaceTokenizer", str(DATA / "tiny_byte_level_bpe")),
}


class BigramDecoder:
    """The next id depends on the last one; counts what it is asked."""

    def __init__(self, logits_VV: torch.Tensor, *, can_join: bool = True) -> None:
        self.can_join = can_join
        self.num_rows = self.most_rows = self.num_steps = 0
        self.lengths: list[int] = []
        self._logits_VV = logits_VV

    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        assert self.can_join or not self.lengths
        self.lengths += [len(prompt) for prompt in prompts]
        self._count()
        return self._logits_VV[torch.tensor([prompt[-1] for prompt in prompts])]

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        assert len(ids) == len(self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        self.num_steps += 1
        return self._logits_VV[torch.tensor(ids)]

    def keep(self, rows: Sequence[int]) -> None:
        assert all(new == old or old >= len(rows) for new, old in enumerate(rows))
        self.lengths = [self.lengths[row] for row in rows]
        self._count()

    def _count(self) -> None:
        self.num_rows = len(self.lengths)
        self.most_rows = max(self.most_rows, self.num_rows)


def bigram_model(
    tokenizer: str = "sentencepiece",
    *,
    seed: int = 0,
    eod_bonus: float = 3.0,
    max_positions: int = 100,
    can_join: bool = True,
    made: list[BigramDecoder] | None = None,
) -> TextModel:
    """A text model with random bigrams; ``eod_bonus`` is added to the logit of the end of a document."""
    loaded = load_tokenizer(*TOKENIZERS[tokenizer])
    generator = torch.Generator().manual_seed(seed)
    logits_VV = 2.0 * torch.randn(loaded.vocab_size, loaded.vocab_size, generator=generator)
    logits_VV[:, loaded.eod] += eod_bonus

    def make_decoder() -> BigramDecoder:
        decoder = BigramDecoder(logits_VV, can_join=can_join)
        if made is not None:
            made.append(decoder)
        return decoder

    return TextModel(
        path="bigrams",
        tokenizer=loaded,
        start_id=loaded.eod,
        stop_ids=frozenset({loaded.eod}),
        vocab_size=loaded.vocab_size,
        max_positions=max_positions,
        make_decoder=make_decoder,
    )


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


def save_checkpoint(
    folder, model_config, tokenizer=None, *, vocab_size=None, start_id=..., standalone=False, more=None
):
    """A checkpoint with random weights, as training would write it."""
    from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
    from megatron_tokedit.engine import checkpoint
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model
    from megatron_tokedit.tokenizers import tokenizer_spec

    loaded = None if tokenizer is None else load_tokenizer(*TOKENIZERS[tokenizer])
    vocab_size = vocab_size or loaded.vocab_size
    parallel, precision = ParallelConfig(), PrecisionConfig(recipe="fp32")
    ctx = initialize(parallel, seed=3, device="cpu", cpu_threads=1, standalone=standalone)
    model = build_model(model_config, precision, ctx, vocab_size, parallel=parallel, wrap_with_ddp=False)
    state = {"step": 1, "vocab_size": vocab_size} | (more or {})
    if loaded is not None:
        state["tokenizer"] = tokenizer_spec(loaded)
    if start_id is not ...:
        state["start_id"] = start_id
    checkpoint.save(
        Path(folder) / "checkpoints",
        model=model,
        optimizer=None,
        scheduler=None,
        state=state,
        run_config={"model": model_config.model_dump(), "precision": precision.model_dump()},
        ctx=ctx,
    )
