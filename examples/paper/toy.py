"""What ``--smoke`` takes instead of a published model and of the domains' corpora; nothing is downloaded.

The model has the architecture of the real one (its family, its kind of norms, a tokenizer with or without
BOS) at toy size. transformers builds it, trains it for some seconds on the standard library's docstrings and
saves it as models are published, so that it is a prior with opinions and not noise. The domains are other
documentation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))

import orjson
from collect import MIN_CHARACTERS, texts_of_domain

STAND_INS = {"biomed": "reference", "finance": "numpy", "math": "mathematics"}
"""Domain -> what of ``collect`` stands for it: Python's reference, numpy's docstrings, those of sympy."""
GENERAL = "stdlib"
VOCAB_SIZE = 768
SEQ_LENGTH = 128
ROWS = 16
TOKENIZERS = {
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "olmo": {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
}


def some_texts(name: str, num_bytes: int) -> Iterator[str]:
    """Texts of a part of ``collect``, long ones cut between paragraphs, until there is so much."""
    for text in texts_of_domain(name):
        paragraphs: list[str] = []
        for paragraph in text.encode("utf-8", "ignore").decode().split("\n\n"):
            paragraphs.append(paragraph)
            if sum(map(len, paragraphs)) >= MIN_CHARACTERS:
                yield "\n\n".join(paragraphs)
                num_bytes -= sum(map(len, paragraphs))
                paragraphs = []
        if num_bytes <= 0:
            return


def write_stand_ins(folder: Path, domains: list[str], num_bytes: int) -> dict[str, str]:
    """A jsonl file a domain; returns their paths by domain."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {domain: folder / f"{domain}.jsonl" for domain in domains}
    for domain, path in paths.items():
        texts = some_texts(STAND_INS[domain], num_bytes)
        path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return {domain: str(path) for domain, path in paths.items()}


def write_published(folder: Path, family: str, steps: int) -> dict[str, float]:
    """Build, train and save the model with its tokenizer; returns the first and the last loss."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    texts = list(some_texts(GENERAL, 400_000))
    tokenizer = _tokenizer(family, texts)
    ids = torch.tensor(
        list(chain.from_iterable([*tokenizer(t).input_ids, tokenizer.eos_token_id] for t in texts))
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(family, tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(ids) - SEQ_LENGTH, (ROWS,)).tolist()
        rows = torch.stack([ids[start : start + SEQ_LENGTH] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"first_loss": losses[0], "last_loss": losses[-1]}


def _config(family: str, tokenizer: Any) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2 if family == "llama" else 4,
        max_position_embeddings=2 * SEQ_LENGTH,
        tie_word_embeddings=family == "olmo",
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0 if family == "llama" else 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"rms_norm_eps": 1e-5} if family == "llama" else {}),
    )


def _tokenizer(family: str, texts: list[str]) -> Any:
    """A byte-level BPE, as both models have; Llama-3's puts BOS before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = TOKENIZERS[family]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if bos := special.get("bos_token"):
        bos_id = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bos_id)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
