"""The whole pipeline against the method as an obvious script: token by token, document by document, in plain
transformers and Python, with nothing of the package in it.

The script tokenizes with sentencepiece, scores with ``log_softmax``, edits in a loop, remembers where every
token came from, and counts. Ids, journal and statistics of every dataset must be the script's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import sentencepiece
import torch
from pipeline_cases import TOKENIZER, VOCAB_SIZE, WORDS, settings
from transformers import AutoModelForCausalLM

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.dataset import CHANGED, DROPPED, IndexedDataset, Journal
from megatron_tokedit.pipeline import run
from megatron_tokedit.testing.models import write_hf_llama

SEED = 77
CONTEXT, OVERLAP = 40, 10
SPIECE = sentencepiece.SentencePieceProcessor(model_file=TOKENIZER)
BOS, EOS = SPIECE.bos_id(), SPIECE.eos_id()
SPECIAL = {SPIECE.piece_to_id(piece) for piece in ("<unk>", "<s>", "</s>", "<pad>", "<sep>")}


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return write_hf_llama(
        tmp_path_factory.mktemp("p") / "llama", vocab_size=VOCAB_SIZE, initializer_range=0.3
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three small files: text and title, lists, empty and short documents, bytes, a bad line."""
    rng = np.random.default_rng(5)
    texts: list[object] = [
        "",
        [],
        ["", ""],
        "a",
        "\U0001f600",
        ["", "the", "", " river"],
        "caf\u00e9 \u4e2d\u6587 \U0001f600",
    ]
    for length in (3, 9, 30, 70, 25, 14):
        words = [str(word) for word in rng.choice([*WORDS, "\u4e2d\u6587", "\U0001f642"], length)]
        texts.append(" ".join(words))
        texts.append([" ".join(words[:2]), "".join(words[::-1])])
    texts += ["<sep>", "a river <sep>rises<sep>", ["<sep><sep> in", "hills <sep> and <sep> falls into sea"]]
    lines = [json.dumps({"text": text, "title": f"{number} \u00fc"}) for number, text in enumerate(texts)]
    lines.insert(4, '{"text": 3, "title": "no text"}')
    folder = tmp_path_factory.mktemp("corpus")
    for number, part in enumerate((lines[:3], lines[3:9], lines[9:])):
        (folder / f"{number}.jsonl").write_text("\n".join(part) + "\n")
    return folder


@dataclass
class Token:
    """A token as it stands, and where it came from."""

    id: int
    position: int


@dataclass
class Counted:
    """What the script counts of a dataset."""

    counts: Counter = field(default_factory=Counter)
    histogram: list[int] = field(default_factory=lambda: [0] * 100)
    perplexities: Counter = field(default_factory=Counter)
    logprob_sum: float = 0.0


class Script:
    """The obvious script.

    Args:
        prior: a Hugging Face folder.
        rules: (action, least p, p to stay below).
        sampler: name, k (or None), top_p, temperature.
        exclude_original: never draw the original.
    """

    def __init__(self, prior, rules, sampler, exclude_original=False):
        self.model = AutoModelForCausalLM.from_pretrained(prior, dtype=torch.float32).eval()
        self.rules, self.sampler, self.exclude_original = rules, sampler, exclude_original

    @torch.no_grad()
    def score(self, ids):
        """float32 log-probabilities of all ids at every position, [T, V]; windows overlap."""
        rows = []
        while len(rows) < len(ids):
            start = max(0, len(rows) - OVERLAP)
            stop = min(start + CONTEXT, len(ids))
            logits = self.model(torch.tensor([[BOS, *ids[start : stop - 1]]])).logits[0]
            rows += list(torch.log_softmax(logits.float(), dim=-1)[len(rows) - start :].numpy())
        return rows

    def action(self, p):
        for action, at_least, below in self.rules:
            if at_least <= p < below:
                return action
        return "keep"

    def draw(self, row, original, number):
        """A new token for a row of log-probabilities."""
        name, k, top_p, temperature = self.sampler
        pool = sorted((i for i in range(VOCAB_SIZE) if i not in SPECIAL), key=lambda i: (-row[i], i))[:k]
        weight = {i: math.exp(float(row[i]) / temperature) for i in range(VOCAB_SIZE)}
        if name == "top_p":
            total, reached, nucleus = sum(weight[i] for i in pool), 0.0, []
            for i in pool:
                nucleus.append(i)
                reached += weight[i] / total
                if reached >= top_p:
                    break
            pool = nucleus
        elif original not in pool:
            pool.append(original)
        if self.exclude_original:
            pool = [i for i in pool if i != original]
        total, reached = sum(weight[i] for i in pool), 0.0
        for i in pool:
            reached += weight[i]
            if reached > number * total:
                return i
        return original

    def edit(self, sequences, texts, generation, counted):
        """The next generation of a document: lists of tokens."""
        tokens = [token for sequence in sequences for token in sequence]
        first = {id(sequence[0]) for sequence in sequences if sequence}
        rows = self.score([token.id for token in tokens])
        numbers = uniforms(texts, len(tokens), generation)
        counts = counted.counts
        counts["tokens"] += len(tokens)
        new = {}
        for t, token in enumerate(tokens):
            logp = float(rows[t][token.id])
            p = math.exp(logp)
            counts["scored"] += 1
            counted.logprob_sum += logp
            counted.histogram[min(int(p * 100), 99)] += 1
            bounds = {bound for _, *pair in self.rules for bound in pair if 0 < bound < 1}
            counts["margin"] += sum(abs(p - bound) <= 1e-4 for bound in bounds)
            action = self.action(p)
            if t == 0 or token.id in SPECIAL or (action == "drop" and id(token) in first):
                action = "keep"
            counts["eligible"] += action != "keep"
            counts["resampled"] += action == "resample"
            new[id(token)] = token.id
            if action == "drop":
                new[id(token)] = None
            elif action == "resample":
                new[id(token)] = self.draw(rows[t], token.id, numbers[t])
        if tokens:
            counts["documents"] += 1
            mean = -sum(float(row[token.id]) for row, token in zip(rows, tokens, strict=True)) / len(tokens)
            counted.perplexities[min(int(mean * 32), 511)] += 1
        for sequence in sequences:
            undo_broken_characters(sequence, new, counts)
        for token in tokens:
            counts["dropped"] += new[id(token)] is None
            counts["changed"] += new[id(token)] not in (None, token.id)
        return [
            [Token(new[id(token)], token.position) for token in sequence if new[id(token)] is not None]
            for sequence in sequences
        ]


def uniforms(texts, number, generation):
    """Random numbers of a document's positions, from the text, the seed and the generation."""
    key = hashlib.blake2b(digest_size=16, person=b"tokedit-document")
    for text in texts:
        key.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    key = hashlib.blake2b(key.digest(), digest_size=16, person=b"tokedit-uniforms")
    key.update(SEED.to_bytes(8, "little") + generation.to_bytes(8, "little"))
    raw = np.random.Philox(key=int.from_bytes(key.digest(), "little")).random_raw(max(number, 1))
    return [(int(word) >> 11) / 2**53 for word in raw]


def piece_bytes(id_):
    """Bytes of a piece of a character; None for a piece of whole ones."""
    if SPIECE.is_byte(id_) and (byte := int(SPIECE.id_to_piece(id_)[1:-1], 16)) >= 0x80:
        return bytes([byte])
    return None


def undo_broken_characters(sequence, new, counts):
    """Undo the edits of every run of pieces of characters that would not be valid UTF-8."""

    def in_run(token):
        return piece_bytes(token.id) is not None or (
            new[id(token)] is not None and piece_bytes(new[id(token)]) is not None
        )

    start = 0
    while start < len(sequence):
        stop = start
        while stop < len(sequence) and in_run(sequence[stop]):
            stop += 1
        run_tokens = sequence[start:stop]
        ids = [new[id(token)] for token in run_tokens]
        try:
            b"".join(b"" if i is None else piece_bytes(i) or b"a" for i in ids).decode()
        except UnicodeDecodeError:
            for token in run_tokens:
                counts["undone"] += new[id(token)] != token.id
                new[id(token)] = token.id
        start = stop + 1


def read(corpus, key):
    """The strings of every document."""
    for path in sorted(corpus.iterdir()):
        for line in path.read_text().splitlines():
            value = json.loads(line)
            if value["title"] == "no text":
                continue
            yield [value[key]] if isinstance(value[key], str) else value[key]


def run_script(script, corpus, key, generations):
    """For every generation its documents (lists of tokens), and what was counted."""
    documents = []
    for texts in read(corpus, key):
        sequences = [SPIECE.encode(text) for text in texts]
        number = 0
        document = []
        for ids in filter(None, sequences):
            document.append([Token(i, number + offset) for offset, i in enumerate(ids)])
            number += len(ids)
        documents.append((texts, document))
    results = [documents]
    counts = []
    for generation in range(1, generations + 1):
        counts.append(Counted())
        results.append(
            [(texts, script.edit(document, texts, generation, counts[-1])) for texts, document in results[-1]]
        )
    return [[document for _, document in result] for result in results], counts


def with_eod(document):
    """The ids as they are written."""
    sequences = [[token.id for token in sequence] for sequence in document]
    return [*sequences[:-1], [*sequences[-1], EOS]] if sequences else []


def journal_of(original, edited):
    """(position, original id, kind) of everything that differs from the original."""
    now = {token.position: token.id for sequence in edited for token in sequence}
    entries = []
    for token in (token for sequence in original for token in sequence):
        if token.position not in now:
            entries.append((token.position, token.id, DROPPED))
        elif now[token.position] != token.id:
            entries.append((token.position, token.id, CHANGED))
    return entries


def check(prefix, original, edited, counted, corpus):
    """A dataset, its journal and its statistics are the script's."""
    dataset, journal = IndexedDataset(prefix), Journal(f"{prefix}.edits")
    assert dataset.num_documents == journal.num_documents == len(edited)
    for index, document in enumerate(edited):
        assert [ids.tolist() for ids in dataset.document(index)] == with_eod(document), index
        entries = journal.entries(index)
        found = zip(
            entries.positions.tolist(), entries.original_ids.tolist(), entries.kinds.tolist(), strict=True
        )
        assert list(found) == journal_of(original[index], document), index
    with open(f"{prefix}.stats.json") as file:
        statistics = json.load(file)
    counts = dict(statistics["edit"]["counts"])
    assert counts.pop("logprob_sum") == pytest.approx(counted.logprob_sum, rel=1e-5)
    assert counts.pop("histogram") == counted.histogram
    assert counts.pop("perplexity_histogram") == [counted.perplexities[i] for i in range(512)]
    assert counts == {name: counted.counts[name] for name in counts}
    assert counts["scored"] == counts["tokens"]
    assert statistics["tokens"] == sum(len(ids) for document in edited for ids in with_eod(document))
    assert statistics["sequences"] == sum(map(len, edited))
    assert statistics["special_tokens_in_text"] == {"<sep>": 7}
    num = len(edited)
    assert statistics["documents"] == {"in": num + 1, "out": num, "dropped": {"bad_line": 1}, "unedited": {}}
    spent = statistics["bytes"]
    num_bytes = sum(
        len(text.encode()) for key in ("text", "title") for texts in read(corpus, key) for text in texts
    )
    assert (spent["in"] - spent["dropped"]["bad_line"], spent["out"]) == (num_bytes, num_bytes)


INF = math.inf
RULES = [
    {"action": "drop", "at_least": 0.003, "below": 0.007},
    {"action": "resample", "at_most": 0.0003},
    {"action": "drop", "below": 0.0006},
    {"action": "resample", "above": 0.01},
]
PLAIN_RULES = [
    ("drop", 0.003, 0.007),
    ("resample", 0, 0.0003),
    ("drop", 0, 0.0006),
    ("resample", 0.01, INF),
]
UP, LOW_UP = [("resample", 0.002, INF)], [("resample", 0.002, INF), ("drop", 0, 0.0005)]
CASES = {
    "top_k": ({"edit_generations": 2}, UP, ("top_k", 8, None, 1.5), False),
    "top_p": ({"edit_sampler": "top_p", "edit_generations": 2}, UP, ("top_p", None, 0.9, 1.5), False),
    "top_p_of_k": (
        {"edit_sampler": "top_p", "edit_top_k": 6, "edit_top_p": 0.7, "edit_exclude_original": True},
        UP,
        ("top_p", 6, 0.7, 1.5),
        True,
    ),
    "rejection": (
        {"edit_sampler": "rejection", "edit_strategy": "low_drop_up_revise", "edit_low_threshold": 0.0005},
        LOW_UP,
        ("rejection", 8, None, 1.0),
        False,
    ),
    "rules": (
        {"edit_rules": RULES, "edit_generations": 2, "edit_temperature": 3.0, "edit_top_k": 20},
        PLAIN_RULES,
        ("top_k", 20, None, 3.0),
        False,
    ),
    "exclude_original": (
        {"edit_exclude_original": True, "edit_threshold": 0.0, "edit_top_k": 1000, "edit_temperature": 2.0},
        [("resample", 0, INF)],
        ("top_k", 1000, None, 2.0),
        True,
    ),
    "everything_dropped": (
        {"edit_strategy": "filtering", "edit_low_threshold": 1.0, "edit_generations": 2},
        [("drop", 0, 1.0)],
        ("top_k", 8, None, 1.5),
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_pipeline_is_the_obvious_script(tmp_path, prior, corpus, case):
    changes, rules, sampler, exclude_original = CASES[case]
    generations = int(changes.get("edit_generations", 1))
    if "edit_rules" not in changes and case != "everything_dropped":
        changes = {"edit_strategy": "up_revise", "edit_threshold": 0.002} | changes
    asked = {
        "input": [str(corpus / "*.jsonl")],
        "json_keys": ["text", "title"],
        "edit_strategy": "up_revise",
        "prior": str(prior),
        "prior_context": CONTEXT,
        "prior_overlap": OVERLAP,
        "prior_device": "cpu",
        "seed": SEED,
        "unit_documents": 5,
        "max_bad_lines": 1,
    }
    config = preprocess_config(settings(tmp_path, "out", **(asked | changes)))
    run(config)
    script = Script(prior, rules, sampler, exclude_original)
    documents, counts = run_script(script, corpus, "text", generations)
    for name, edited, counted in zip(config.dataset_names("text"), documents[1:], counts, strict=True):
        check(f"{tmp_path}/out_{name}_document", documents[0], edited, counted, corpus)
    assert counts[0].counts["eligible"] > 100
