"""Scoring with a GPT-2 of 124M parameters against plain Hugging Face loops and the machine's product rate.

    python benchmarks/score.py                                        # random ids, lengths as of web text
    python benchmarks/score.py --text corpus.txt --tokenizer gpt2/    # a text of one's own

The prior has GPT-2's shape and random weights. Each contestant has processes of its own, so that none works
with memory that another left behind, as many as the machine has cores with one thread each: what
`tools/preprocess_edit.py` does by default. They take turns, round by round, over the same documents (cut to
the context), so that whatever else the machine does hits all of them. The table shows medians over the rounds
and the best round; shares are of the matrix-product rate measured in the same round, and of best to best.
Where other processes compete for the cores, trust the best. Floating-point operations are those of real
tokens: 2 x parameters of matrix products, output layer included, and causal attention.

"Plain, batch 1": one document after the other, `log_softmax` of float32 logits. "Plain, padded 8": eight
documents as they come, padded, attention mask, full float32 `log_softmax`. "Best plain": our batches of
similar length, no mask (sdpa's causal flag), cross entropy of float32 logits. "Ours + editing" finds eight
candidates for the share of tokens that --eligible says, and edits the documents.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from megatron_tokedit.edit.editor import Candidates, EditMethod, Editor  # noqa: E402
from megatron_tokedit.edit.rules import preset  # noqa: E402
from megatron_tokedit.edit.samplers import TopK  # noqa: E402
from megatron_tokedit.scoring.base import CandidateRequest  # noqa: E402
from megatron_tokedit.scoring.cost import count_flops, matrix_product_rate, peak_memory_bytes  # noqa: E402
from megatron_tokedit.scoring.load import identify_prior, load_scorer, scoring_options  # noqa: E402
from megatron_tokedit.scoring.scorer import CausalScorer  # noqa: E402
from megatron_tokedit.scoring.windows import Window, plan_batches  # noqa: E402

CONTEXT_TOKENS = 1024
VOCAB_SIZE = 50257
EOD = 50256
Documents = list[Any]
Contestant = Callable[[], object]
DTYPES = ("float32", "bfloat16")
PRODUCTS = "matrix products"
CONTESTANTS = (
    "plain, batch 1, float32",
    "plain, padded 8, float32",
    "best plain, float32",
    "best plain, bfloat16",
    "ours, float32",
    "ours + editing, float32",
    "ours, bfloat16",
    "ours + editing, bfloat16",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each contestant's rounds, product rates of the rounds, peak bytes of each contestant."""

    seconds: dict[str, list[float]]
    rates: dict[str, list[float]]
    memory: dict[str, int]


def documents(args: argparse.Namespace) -> Documents:
    """Documents of about --tokens tokens together."""
    if args.text is None:
        rng = np.random.default_rng(0)
        lengths = np.exp(rng.normal(5.6, 0.9, 10_000)).astype(int).clip(16, CONTEXT_TOKENS)
        found = (rng.integers(0, EOD, length).astype(np.int32) for length in lengths)
    else:
        from megatron_tokedit.tokenizers import load_tokenizer

        tokenizer = load_tokenizer("HuggingFaceTokenizer", args.tokenizer)
        sections = Path(args.text).read_text().split("\n = ")  # WikiText's headings; else one document
        ids = (np.array(tokenizer.encode(section), np.int32) for section in sections)
        found = (part[i : i + CONTEXT_TOKENS] for part in ids for i in range(0, len(part), CONTEXT_TOKENS))
    chosen: Documents = []
    for ids_T in found:
        if sum(map(len, chosen)) >= args.tokens:
            break
        if len(ids_T) > 1:
            chosen.append(ids_T)
    return chosen


def write_prior(folder: str) -> None:
    """GPT-2 124M with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)


def ours(folder: str, dtype: str, args: argparse.Namespace) -> CausalScorer:
    """The package's scorer."""
    identity = identify_prior(folder)
    options = scoring_options(
        identity, start_id=None, batch_tokens=args.batch_tokens, logits_bytes=args.logits_bytes
    )
    scorer = load_scorer(identity, options, dtype=dtype, device="cpu")
    return scorer


def editing(scorer: CausalScorer, docs: Documents, share: float) -> Contestant:
    """Scoring, candidates and editing, with a threshold that makes a share of the tokens eligible."""
    logprobs = np.concatenate([score.logprobs_T[1:] for score in scorer.score(docs)])
    threshold = float(np.exp(np.quantile(logprobs, 1 - share)))
    method = EditMethod(preset("up_revise", threshold=threshold), TopK(8, 1.5))
    editor = Editor(method, vocab_size=VOCAB_SIZE, special_ids=frozenset({EOD}), bos=None, incomplete_utf8={})
    request = CandidateRequest(8, method.rules.resample_intervals, (EOD,))

    def run() -> None:
        for index, (ids_T, score) in enumerate(zip(docs, scorer.score(docs, request), strict=True)):
            candidates = Candidates(
                score.candidate_positions_E, score.candidate_ids_EK, score.candidate_logprobs_EK
            )
            editor.edit([ids_T], score.logprobs_T, candidates, index.to_bytes(32, "little"))

    return run


def padded(group: Documents) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of some documents, padded on the right."""
    ids_BT = torch.zeros(len(group), max(map(len, group)), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids_T in enumerate(group):
        ids_BT[row, : len(ids_T)] = torch.from_numpy(ids_T)
        mask_BT[row, : len(ids_T)] = 1
    return ids_BT, mask_BT


def plain(folder: str, dtype: str, docs: Documents, size: int) -> Contestant:
    """Hugging Face as one would write it: so many documents at a time, full log-softmax."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def run() -> None:
        for start in range(0, len(docs), size):
            ids_BT, mask_BT = padded(docs[start : start + size])
            mask = mask_BT if size > 1 else None
            logits = model(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits[:, :-1]
            logits.float().log_softmax(-1).gather(2, ids_BT[:, 1:, None])

    return run


def best_plain(folder: str, dtype: str, docs: Documents, batch_tokens: int) -> Contestant:
    """Hugging Face with documents of similar length together, no mask, and cross entropy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    windows = [Window(index, 0, len(ids_T), 0) for index, ids_T in enumerate(docs)]
    batches = [[docs[window.document] for window in batch] for batch in plan_batches(windows, batch_tokens)]

    @torch.inference_mode()
    def run() -> None:
        for group in batches:
            ids_BT, _ = padded(group)
            logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none")

    return run


def product_rates() -> dict[str, float]:
    """Floating-point operations a second of matrix products."""
    return {dtype: matrix_product_rate(torch.device("cpu"), getattr(torch, dtype)) for dtype in DTYPES}


def contestant(name: str, folder: str, docs: Documents, args: argparse.Namespace) -> Contestant:
    """What a name of the table stands for."""
    kind, _, dtype = name.rpartition(", ")
    if kind == "plain, batch 1":
        return plain(folder, dtype, docs, 1)
    if kind == "plain, padded 8":
        return plain(folder, dtype, docs, 8)
    if kind == "best plain":
        return best_plain(folder, dtype, docs, args.batch_tokens)
    scorer = ours(folder, dtype, args)
    if kind == "ours + editing":
        return editing(scorer, docs, args.eligible)
    return lambda: scorer.score(docs)


def serve(connection: Any, name: str, folder: str, docs: Documents, args: argparse.Namespace) -> None:
    """A contestant's process: run once for every message; answer seconds and peak memory."""
    torch.set_num_threads(args.threads)
    if name == PRODUCTS:
        while connection.recv():
            connection.send(product_rates())
        return
    run = contestant(name, folder, docs, args)
    while connection.recv():
        begin = time.perf_counter()
        run()
        connection.send((time.perf_counter() - begin, peak_memory_bytes(torch.device("cpu"))))


class Team:
    """A contestant in as many processes of its own as ``--processes`` says, each over the same documents."""

    def __init__(self, name: str, folder: str, docs: Documents, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._members: list[tuple[Any, Any]] = []
        for _ in range(args.processes):
            ours_, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, folder, docs, args), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours_))

    def run(self) -> list[Any]:
        """One run in each process at the same time; what they answer."""
        for _, connection in self._members:
            connection.send(True)
        return [connection.recv() for _, connection in self._members]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._members:
            connection.send(False)
            process.join()


def measure(folder: str, docs: Documents, args: argparse.Namespace) -> Measured:
    """Every contestant in every round, after an unmeasured one; product rates before every contestant, of
    which the median of a round counts.
    """
    teams = {name: Team(name, folder, docs, args) for name in (PRODUCTS, *CONTESTANTS)}
    measured = Measured({name: [] for name in CONTESTANTS}, {dtype: [] for dtype in DTYPES}, {})
    for index in range(args.rounds + 1):
        rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        for name in CONTESTANTS:
            answers = teams[PRODUCTS].run()
            for dtype in DTYPES:
                rates[dtype].append(sum(answer[dtype] for answer in answers))
            answers = teams[name].run()
            measured.memory[name] = max(peak for _, peak in answers)
            if index:
                measured.seconds[name].append(max(seconds for seconds, _ in answers))
        if index:
            for dtype, found in rates.items():
                measured.rates[dtype].append(statistics.median(found))
    for team in teams.values():
        team.close()
    return measured


def report(measured: Measured, num_tokens: int, flops: int) -> None:
    """Print the table and the ratios."""
    seconds, rates = measured.seconds, measured.rates
    heads = ("tokens/s", "of rate", "best", "of rate", "peak MB")
    print(f"{'':28}" + "".join(f"{head:>10}" for head in heads))
    for name, values in seconds.items():
        rate = rates[name.rpartition(", ")[2]]
        share = statistics.median(flops / value / one for value, one in zip(values, rate, strict=True))
        middle, best = num_tokens / statistics.median(values), num_tokens / min(values)
        print(
            f"{name:28}{middle:10.0f}{share:10.0%}{best:10.0f}"
            f"{flops / min(values) / max(rate):10.0%}{measured.memory[name] / 1e6:10.0f}"
        )
    for dtype, values in rates.items():
        middle, best = statistics.median(values) / 1e9, max(values) / 1e9
        print(f"matrix products, {dtype}: {middle:.0f}, at best {best:.0f} GFLOP/s")

    def ratio(slow: str, fast: str) -> str:
        pairs = zip(seconds[slow], seconds[fast], strict=True)
        best = min(seconds[slow]) / min(seconds[fast])
        return f"{statistics.median(a / b for a, b in pairs):.2f} ({best:.2f})"

    print("ratios of times, median of rounds (best to best)")
    for dtype in DTYPES:
        print(f"best plain / ours, {dtype}: {ratio(f'best plain, {dtype}', f'ours, {dtype}')}")
        print(f"plain padded 8 / ours, {dtype}: {ratio('plain, padded 8, float32', f'ours, {dtype}')}")
        print(f"with editing / scoring alone, {dtype}: {ratio(f'ours + editing, {dtype}', f'ours, {dtype}')}")
    print(f"plain batch 1 / ours, float32: {ratio('plain, batch 1, float32', 'ours, float32')}")


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", help="a text file; default: random ids")
    parser.add_argument("--tokenizer", help="Hugging Face tokenizer folder for --text")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="workers (as --workers)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each (as --prior-threads)")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--logits-bytes", type=int, default=128 << 20)
    parser.add_argument("--eligible", type=float, default=0.15, help="share of tokens that are edited")
    args = parser.parse_args()
    if args.text and not args.tokenizer:
        parser.error("--text needs --tokenizer")
    return args


def main() -> None:
    """Run the contestants and print the table."""
    args = parse()
    torch.set_num_threads(args.threads)
    docs = documents(args)
    num_tokens = sum(map(len, docs))
    threads = f"{args.processes} processes of {args.threads} threads"
    with tempfile.TemporaryDirectory() as folder:
        write_prior(folder)
        flops = count_flops(ours(folder, "float32", args), [len(ids_T) for ids_T in docs])
        print(
            f"GPT-2 124M, {len(docs)} documents, {num_tokens} tokens a process, {threads}, "
            f"batches of {args.batch_tokens} tokens, {flops / num_tokens / 1e6:.0f} MFLOP a token"
        )
        report(measure(folder, docs, args), num_tokens * args.processes, flops * args.processes)


if __name__ == "__main__":
    main()
