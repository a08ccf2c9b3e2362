"""Priors with random weights, documents for them to score, and the editing that follows.

Invariant: ids, not text: what is measured is the prior and the edit, not a tokenizer. Weights are random, so
that probabilities are nearly equal; which tokens are edited is settled by their share, not by a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from shapes import Shape, hf_model

from megatron_tokedit.edit.editor import Candidates, EditMethod, Editor
from megatron_tokedit.edit.rules import preset
from megatron_tokedit.edit.samplers import TopK
from megatron_tokedit.scoring.base import CandidateRequest, TokenScores
from megatron_tokedit.scoring.load import identify_prior, load_scorer, scoring_options
from megatron_tokedit.scoring.scorer import CausalScorer
from megatron_tokedit.scoring.windows import Window, plan_batches

Documents = list[npt.NDArray[np.int32]]
NUM_CANDIDATES = 8
TEMPERATURE = 1.5


def random_documents(num_tokens: int, *, vocab_size: int, context_tokens: int, seed: int = 0) -> Documents:
    """About so many tokens in documents as long as those of web text, none longer than the context.

    The last id of the vocabulary, the end of text, does not occur.
    """
    rng = np.random.default_rng(seed)
    documents: Documents = []
    while sum(map(len, documents)) < num_tokens:
        length = int(np.exp(rng.normal(5.6, 0.9)).clip(16, context_tokens))
        documents.append(rng.integers(0, vocab_size - 1, length).astype(np.int32))
    return documents


def text_documents(path: str, tokenizer_folder: str, num_tokens: int, *, context_tokens: int) -> Documents:
    """About so many tokens of a text, cut at WikiText's headings where it has them, and to the context."""
    from megatron_tokedit.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_folder)
    documents: Documents = []
    for section in Path(path).read_text().split("\n = "):
        ids = np.array(tokenizer.encode(section), np.int32)
        for start in range(0, len(ids), context_tokens):
            if sum(map(len, documents)) >= num_tokens:
                return documents
            if len(part := ids[start : start + context_tokens]) > 1:
                documents.append(part)
    return documents


def write_hf(folder: str, shape: Shape, *, device: torch.device, dtype: str = "float32") -> None:
    """A Hugging Face folder with random weights."""
    torch.manual_seed(0)
    with device:
        model = hf_model(shape, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)


def write_model_folder(folder: str, shape: Shape) -> None:
    """A Hugging Face folder in bfloat16 with a tokenizer, of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_hf(folder, shape, device=torch.device("cpu"), dtype="bfloat16")
    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=pieces[0]).save_pretrained(folder)


def write_megatron(folder: str, shape: Shape, *, recipe: str) -> None:
    """A checkpoint of this package with random weights, without an optimizer."""
    from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
    from megatron_tokedit.engine import checkpoint
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model

    parallel, precision = ParallelConfig(), PrecisionConfig(recipe=recipe)
    ctx = initialize(parallel, seed=0, standalone=True)
    chunks = build_model(
        shape.model, precision, ctx, shape.vocab_size, parallel=parallel, wrap_with_ddp=False
    )
    checkpoint.save(
        folder,
        model=chunks,
        optimizer=None,
        scheduler=None,
        state={"step": 1, "vocab_size": shape.vocab_size},
        run_config={"model": shape.model.model_dump(), "precision": precision.model_dump()},
        ctx=ctx,
    )
    ctx.destroy()


def write_prior(folder: str, shape: Shape, *, backend: str, device: torch.device) -> None:
    """A prior folder of either kind; half the size on a GPU."""
    on_gpu = device.type == "cuda"
    if backend == "megatron":
        write_megatron(folder, shape, recipe="bf16" if on_gpu else "fp32")
    else:
        write_hf(folder, shape, device=device, dtype="bfloat16" if on_gpu else "float32")


def load_prior(
    folder: str,
    *,
    dtype: str,
    device: str = "cpu",
    batch_tokens: int = 2048,
    logits_bytes: int = 128 << 20,
) -> CausalScorer:
    """The package's scorer over a folder."""
    identity = identify_prior(folder)
    options = scoring_options(identity, start_id=None, batch_tokens=batch_tokens, logits_bytes=logits_bytes)
    return load_scorer(identity, options, dtype=dtype, device=device)


class Editing:
    """What comes after the scores: candidates for a share of the tokens, and the edit.

    Args:
        scorer: the prior; scores the documents once, to find the threshold.
        documents: what is edited.
        eligible_share: of the tokens.
    """

    def __init__(self, scorer: CausalScorer, documents: Documents, eligible_share: float) -> None:
        self._scorer, self._documents = scorer, documents
        logprobs = np.concatenate([score.logprobs_T[1:] for score in scorer.score(documents)])
        self.threshold = float(np.exp(np.quantile(logprobs, 1 - eligible_share)))
        method = EditMethod(preset("up_revise", threshold=self.threshold), TopK(NUM_CANDIDATES, TEMPERATURE))
        end_of_text = scorer.vocab_size - 1
        self._editor = Editor(
            method,
            vocab_size=scorer.vocab_size,
            special_ids=frozenset({end_of_text}),
            bos=None,
            incomplete_utf8={},
        )
        self._request = CandidateRequest(NUM_CANDIDATES, method.rules.resample_intervals, (end_of_text,))

    def score(self) -> list[TokenScores]:
        """Scores with candidates."""
        return self._scorer.score(self._documents, self._request)

    def edit(self, scores: Sequence[TokenScores]) -> tuple[int, int]:
        """Edit the documents; returns tokens that were eligible and that changed."""
        eligible = changed = 0
        for index, (ids_T, score) in enumerate(zip(self._documents, scores, strict=True)):
            candidates = Candidates(
                score.candidate_positions_E, score.candidate_ids_EK, score.candidate_logprobs_EK
            )
            edited = self._editor.edit([ids_T], score.logprobs_T, candidates, index.to_bytes(32, "little"))
            eligible, changed = eligible + edited.num_eligible, changed + edited.num_changed
        return eligible, changed

    def run(self) -> tuple[int, int]:
        """Score, find candidates, edit."""
        return self.edit(self.score())


def padded(group: Documents, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[B, T]`` and attention mask of some documents, padded on the right."""
    ids_BT = torch.zeros(len(group), max(map(len, group)), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids_T in enumerate(group):
        ids_BT[row, : len(ids_T)] = torch.from_numpy(ids_T)
        mask_BT[row, : len(ids_T)] = 1
    return ids_BT.to(device), mask_BT.to(device)


def similar_batches(documents: Documents, batch_tokens: int) -> list[Documents]:
    """The documents in batches of similar length, as the package forms them."""
    windows = [Window(index, 0, len(ids_T), 0) for index, ids_T in enumerate(documents)]
    return [[documents[window.document] for window in batch] for batch in plan_batches(windows, batch_tokens)]


def plain_model(folder: str, dtype: str, device: torch.device) -> Any:
    """A Hugging Face model as one would load it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
