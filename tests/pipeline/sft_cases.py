"""What the tests of preprocessing conversations share: conversations, settings, an obvious oracle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from pipeline_cases import TOKENIZER, WORDS

from megatron_tokedit.dataset import IndexedDataset
from megatron_tokedit.dataset.loss_mask import open_loss_mask
from megatron_tokedit.tokenizers import load_chat_template, load_tokenizer

CONTEXT = 200
SUFFIXES = (".bin", ".idx", "_loss_mask.bin", "_loss_mask.idx")


def talk(rng: random.Random, num_exchanges: int, *, system: bool = False) -> list[dict[str, str]]:
    """A conversation of nonsense."""

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    messages = [{"role": "system", "content": words(4)}] if system else []
    for _ in range(num_exchanges):
        messages.append({"role": "user", "content": words(5)})
        messages.append({"role": "assistant", "content": words(8)})
    return messages


def write_conversations(path: Path, num_conversations: int = 24, seed: int = 0) -> Path:
    """JSON lines in all layouts; one has an empty response, one ends with a question, one is very long."""
    rng = random.Random(seed)
    records: list[dict[str, Any]] = []
    for index in range(num_conversations):
        messages = talk(rng, 1 + index % 3, system=index % 4 == 0)
        exchange = {"prompt": messages[-2]["content"], "response": messages[-1]["content"]}
        alpaca = {"instruction": exchange["prompt"], "input": "", "output": exchange["response"]}
        shared = [{"from": each["role"], "value": each["content"]} for each in messages]
        layouts = ({"messages": messages}, exchange, alpaca, {"conversations": shared})
        records.append(layouts[index % len(layouts)])
    records[5] = {"prompt": "who counts", "response": " \n"}
    records[8]["messages"].append({"role": "user", "content": "and then"})
    records[12] = {"messages": talk(rng, 12, system=True)}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sft(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Settings of a job over ``folder/talks.jsonl`` that edits nothing."""
    return {
        "input": [str(folder / "talks.jsonl")],
        "format": "sft",
        "sft_chat_template": "tulu",
        "output_prefix": str(folder / name),
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": TOKENIZER,
        "edit_strategy": "none",
        "sft_max_tokens": CONTEXT,
        "unit_documents": 5,
        "workers": 1,
    } | changes


def editing(prior: Path, **changes: Any) -> dict[str, Any]:
    """Settings that make a random prior edit much."""
    return {
        "edit_strategy": "up_revise",
        "edit_threshold": 0.003,
        "prior": str(prior),
        "prior_device": "cpu",
        "prior_context": CONTEXT,
        "prior_batch_tokens": 400,
    } | changes


def files(folder: Path, name: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[bytes]:
    """The bytes of a job's outputs."""
    return [(folder / f"{name}_sft_document{suffix}").read_bytes() for suffix in suffixes]


def documents(prefix: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and mask of every document."""
    dataset = IndexedDataset(prefix)
    mask = open_loss_mask(dataset)
    return [
        (np.concatenate(dataset.document(index)), np.concatenate(mask.document(index)))
        for index in range(dataset.num_documents)
    ]


def pieces_of(messages: list[dict[str, str]], *, eos: str = "</s>") -> list[tuple[str, bool]]:
    """A conversation in the template ``tulu``, as texts with whether they are a response."""
    pieces: list[tuple[str, bool]] = []
    for message in messages:
        is_response = message["role"] == "assistant"
        pieces.append((f"<|{message['role']}|>\n", False))
        pieces.append((message["content"], is_response))
        pieces.append((f"{eos}\n" if is_response else "\n", False))
    return pieces


def reference(messages: list[dict[str, str]]) -> tuple[list[int], list[int], list[bool]]:
    """Ids, mask and responses of a conversation, by an obvious way: token after token, the text that the ids
    so far decode to is looked up in the conversation's pieces.
    """
    tokenizer = load_tokenizer("SentencePieceTokenizer", TOKENIZER)
    template = load_chat_template("tulu", None, tokenizer.special_tokens, TOKENIZER)
    text = template.render(messages).text
    ids: list[int] = []
    parts = text.split("</s>")
    for number, part in enumerate(parts):
        ids += tokenizer.encode(part) + ([tokenizer.eod] if number + 1 < len(parts) else [])
    owner = "".join(("r" if inside else "t") * len(piece) for piece, inside in pieces_of(messages))
    assert len(owner) == len(text)
    mask, response, done, pending = [], [], 0, []
    for position, id_ in enumerate(ids):
        decoded = tokenizer.decode(np.array(ids[: position + 1]))
        pending.append(position)
        if "\ufffd" in decoded:  # a byte of a character that is not whole yet
            continue
        owners = owner[done : len(decoded)]
        done = len(decoded)
        for _ in pending:
            inside = bool(owners) and set(owners) == {"r"}
            response.append(inside)
            mask.append(int(inside or id_ == tokenizer.eod or (bool(owners) and owners[-1] == "r")))
        pending = []
    return ids, mask, response
