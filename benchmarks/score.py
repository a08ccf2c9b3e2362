"""Scoring against plain Hugging Face loops and the device's product rate.

    python benchmarks/score.py                                        # GPT-2 124M on CPU, random ids
    python benchmarks/score.py --text corpus.txt --tokenizer gpt2/    # a text of one's own
    python benchmarks/score.py --device cuda --shape 8b --tokens 200000   # bfloat16 and fp8 on a GPU

The prior has random weights. On a CPU each contestant has processes of its own, so that none works with
memory that another left behind, as many as the machine has cores with one thread each: what
`tools/preprocess_edit.py` does by default. They take turns, round by round, over the same documents (cut to
the context), so that whatever else the machine does hits all of them. On a GPU they come one after the other,
one process each, for only one of the larger priors fits. The table shows medians over the rounds and the best
round; shares are of the matrix-product rate measured in the same round, and of best to best; those of fp8
are of the rate of fp8 products. Where other processes compete for the cores, trust the best. Floating-point
operations are those of real tokens: 2 x parameters of matrix products, output layer included, and causal
attention.

"Plain, batch 1": one document after the other, `log_softmax` of float32 logits. "Plain, padded 8": eight
documents as they come, padded, attention mask, full float32 `log_softmax`. "Best plain": our batches of
similar length, no mask (sdpa's causal flag), cross entropy of float32 logits. "Ours + editing" finds eight
candidates for the share of tokens that --eligible says, and edits the documents. "Ours (Megatron)" scores a
checkpoint of this package, the others the Hugging Face model of the same shape.
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from measuring import Report, median_ratio, parser, product_flops, synchronize  # noqa: E402
from priors import (  # noqa: E402
    Documents,
    Editing,
    load_prior,
    padded,
    plain_model,
    random_documents,
    similar_batches,
    text_documents,
    write_prior,
)
from shapes import SHAPES, forward_flops, shape_named  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from megatron_tokedit.errors import TokeditError  # noqa: E402
from megatron_tokedit.scoring.cost import peak_memory_bytes  # noqa: E402

Contestant = Callable[[], object]
PRODUCTS = "matrix products"
CPU_CONTESTANTS = (
    "plain, batch 1, float32",
    "plain, padded 8, float32",
    "best plain, float32",
    "best plain, bfloat16",
    "ours, float32",
    "ours + editing, float32",
    "ours, bfloat16",
    "ours + editing, bfloat16",
    "ours (Megatron), float32",
    "ours (Megatron), bfloat16",
)
GPU_CONTESTANTS = (
    "plain, padded 8, bfloat16",
    "best plain, bfloat16",
    "ours, bfloat16",
    "ours + editing, bfloat16",
    "ours (Megatron), bfloat16",
    "ours (Megatron) + editing, bfloat16",
    "ours (Megatron), fp8",
    "ours (Megatron) + editing, fp8",
)
RATIOS = (
    ("best plain, {}", "ours, {}", "time; higher is better"),
    ("plain, padded 8, {}", "ours, {}", "time; higher is better"),
    ("plain, padded 8, float32", "ours, bfloat16", "time; higher is better"),
    ("plain, batch 1, {}", "ours, {}", "time; higher is better"),
    ("ours + editing, {}", "ours, {}", "time; lower is better"),
    ("ours (Megatron), {}", "ours, {}", "time; lower is better"),
    ("ours (Megatron) + editing, {}", "ours (Megatron), {}", "time; at most 1.03 on a GPU"),
    ("ours (Megatron), bfloat16", "ours (Megatron), fp8", "time; at least 1.5"),
)
"""Times of the first over times of the second, for every dtype in which both ran."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of each contestant's rounds, product rates of the same rounds, peak bytes."""

    seconds: dict[str, list[float]]
    rates: dict[str, list[float]]
    memory: dict[str, int]


def dtype_of(name: str) -> str:
    """The dtype that a contestant's name ends with."""
    return name.rpartition(", ")[2]


def plain(folder: str, dtype: str, documents: Documents, size: int, device: torch.device) -> Contestant:
    """Hugging Face as one would write it: so many documents at a time, full log-softmax."""
    model = plain_model(folder, dtype, device)

    @torch.inference_mode()
    def run() -> None:
        for start in range(0, len(documents), size):
            ids_BT, mask_BT = padded(documents[start : start + size], device)
            mask = mask_BT if size > 1 else None
            logits = model(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits[:, :-1]
            logits.float().log_softmax(-1).gather(2, ids_BT[:, 1:, None])

    return run


def best_plain(
    folder: str, dtype: str, documents: Documents, batch_tokens: int, device: torch.device
) -> Contestant:
    """Hugging Face with documents of similar length together, no mask, and cross entropy."""
    model = plain_model(folder, dtype, device)
    batches = similar_batches(documents, batch_tokens)

    @torch.inference_mode()
    def run() -> None:
        for group in batches:
            ids_BT, _ = padded(group, device)
            logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none")

    return run


def contestant(name: str, folder: str, documents: Documents, args: argparse.Namespace) -> Contestant:
    """What a name of the table stands for."""
    kind, _, dtype = name.rpartition(", ")
    device = torch.device(args.device)
    if kind == "plain, batch 1":
        return plain(f"{folder}/hf", dtype, documents, 1, device)
    if kind == "plain, padded 8":
        return plain(f"{folder}/hf", dtype, documents, 8, device)
    if kind == "best plain":
        return best_plain(f"{folder}/hf", dtype, documents, args.batch_tokens, device)
    scorer = load_prior(
        f"{folder}/{backend_of(name)}",
        dtype=dtype,
        device=args.device,
        batch_tokens=args.batch_tokens,
        logits_bytes=args.logits_bytes,
    )
    if kind.endswith("+ editing"):
        return Editing(scorer, documents, args.eligible).run
    return lambda: scorer.score(documents)


def backend_of(name: str) -> str:
    """The kind of prior that a contestant scores with."""
    return "megatron" if "(Megatron)" in name else "hf"


def serve(connection: Any, name: str, folder: str, documents: Documents, args: argparse.Namespace) -> None:
    """A contestant's process: run once for every message; answer seconds and peak memory, or a fault."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    try:
        if name == PRODUCTS:
            while connection.recv():
                connection.send({dtype: product_flops(device, dtype) for dtype in args.dtypes})
            return
        run = contestant(name, folder, documents, args)
        while connection.recv():
            begin = time.perf_counter()
            run()
            synchronize(device)
            connection.send((time.perf_counter() - begin, peak_memory_bytes(device)))
    except (TokeditError, torch.OutOfMemoryError) as error:
        connection.send(str(error).splitlines()[0])


class Team:
    """A contestant in as many processes of its own as ``--processes`` says, each over the same documents."""

    def __init__(self, name: str, folder: str, documents: Documents, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.refusal: str | None = None
        self._members: list[tuple[Any, Any]] = []
        for _ in range(args.processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, folder, documents, args), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def run(self) -> list[Any]:
        """One run in each process at the same time; what they answer, nothing where one cannot."""
        if self.refusal is None:
            for _, connection in self._members:
                with suppress(OSError):  # it has ended, and said why or died
                    connection.send(True)
            try:
                answers = [connection.recv() for _, connection in self._members]
            except EOFError:
                answers = ["a process of it died"]
            self.refusal = next((answer for answer in answers if isinstance(answer, str)), None)
        return [] if self.refusal else answers

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._members:
            if self.refusal is None:
                connection.send(False)
                process.join()
            else:
                process.kill()
            connection.close()


def measure(folder: str, documents: Documents, args: argparse.Namespace, report: Report) -> Measured:
    """Every contestant in every round, after an unmeasured one; product rates before every contestant.

    All take turns, or on a GPU come one after the other.
    """
    measured = Measured({name: [] for name in args.contestants}, {name: [] for name in args.contestants}, {})
    products = Team(PRODUCTS, folder, documents, args)

    def play(teams: dict[str, Team]) -> None:
        for index in range(args.rounds + 1):
            for name, team in teams.items():
                rates = [answer[dtype_of(name)] for answer in products.run()]
                answers = team.run()
                if answers:
                    measured.memory[name] = max(peak for _, peak in answers)
                if answers and index:
                    measured.rates[name].append(sum(rates))
                    measured.seconds[name].append(max(seconds for seconds, _ in answers))
        for name, team in teams.items():
            if team.refusal:
                report.skip(name, team.refusal)
            team.close()

    groups = [[name] for name in args.contestants] if args.device == "cuda" else [list(args.contestants)]
    for names in groups:
        play({name: Team(name, folder, documents, args) for name in names})
    products.close()
    return measured


def report_all(report: Report, measured: Measured, num_tokens: int, flops: float) -> None:
    """Print the table and the ratios."""
    seconds = {name: values for name, values in measured.seconds.items() if values}
    rates = dtype_rates(measured)
    rows = []
    for name, values in seconds.items():
        rate = rates[dtype_of(name)]
        share = statistics.median(flops / value / one for value, one in zip(values, rate, strict=False))
        best = flops / min(values) / max(rate)
        peak = measured.memory[name] / 1e6
        rows.append(
            (name, num_tokens / statistics.median(values), f"{share:.0%}", num_tokens / min(values),
             f"{best:.0%}", peak)
        )  # fmt: skip
    report.table("scoring", ("tokens/s", "of rate", "best", "of rate", "peak MB"), rows)
    for dtype, values in rates.items():
        report.limit(f"matrix products, {dtype}, median", statistics.median(values) / 1e9, "GFLOP/s")
        report.limit(f"matrix products, {dtype}, best", max(values) / 1e9, "GFLOP/s")
    for slow, fast, wanted in RATIOS:
        for dtype in rates if "{}" in fast else [None]:
            above, below = slow.format(dtype), fast.format(dtype)
            if above in seconds and below in seconds:
                best = min(seconds[above]) / min(seconds[below])
                value = median_ratio(seconds[above], seconds[below])
                report.ratio(f"{above} / {below}", value, f"{wanted}; best to best {best:.3g}")


def dtype_rates(measured: Measured) -> dict[str, list[float]]:
    """Product rates of each dtype: of every round the median of those taken before its contestants."""
    found: dict[str, list[list[float]]] = {}
    for name, values in measured.rates.items():
        if values:
            found.setdefault(dtype_of(name), []).append(values)
    return {
        dtype: [statistics.median(of_round) for of_round in zip(*lists, strict=False)]
        for dtype, lists in found.items()
    }


def parse() -> argparse.Namespace:
    """Command-line arguments; what depends on the device is filled in."""
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="124m")
    made.add_argument("--layers", type=int, help="fewer layers than the shape has")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--only", nargs="+", default=[""], help="contestants with one of these in their name")
    made.add_argument("--text", help="a text file; default: random ids")
    made.add_argument("--tokenizer", help="Hugging Face tokenizer folder for --text")
    made.add_argument("--tokens", type=int, default=6000)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--processes", type=int, help="workers (as --workers); default: cores, 1 on a GPU")
    made.add_argument("--threads", type=int, default=1, help="threads of each (as --prior-threads)")
    made.add_argument("--batch-tokens", type=int, help="default: 2048, 16384 on a GPU")
    made.add_argument("--logits-bytes", type=int, help="default: 128 MiB, 1 GiB on a GPU")
    made.add_argument("--eligible", type=float, default=0.15, help="share of tokens that are edited")
    made.add_argument("--folder", help="where the prior is written; default: the temporary one")
    args = made.parse_args()
    if args.text and not args.tokenizer:
        made.error("--text needs --tokenizer")
    on_gpu = args.device == "cuda"
    args.processes = args.processes or (1 if on_gpu else len(os.sched_getaffinity(0)))
    args.batch_tokens = args.batch_tokens or (16384 if on_gpu else 2048)
    args.logits_bytes = args.logits_bytes or (1 << 30 if on_gpu else 128 << 20)
    names = GPU_CONTESTANTS if on_gpu else CPU_CONTESTANTS
    args.contestants = [name for name in names if any(part in name for part in args.only)]
    args.dtypes = list(dict.fromkeys(dtype_of(name) for name in args.contestants))
    return args


def write_priors(folder: str, args: argparse.Namespace) -> None:
    """The priors that the contestants need, each in a process of its own, which leaves no memory behind."""
    shape = shape_named(args.shape, args.layers)
    for backend in sorted({backend_of(name) for name in args.contestants}):
        process = multiprocessing.get_context("spawn").Process(
            target=write_prior,
            args=(f"{folder}/{backend}", shape),
            kwargs={"backend": backend, "device": torch.device(args.device)},
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"the {backend} prior could not be written")


def main() -> None:
    """Run the contestants and print the table."""
    args = parse()
    torch.set_num_threads(args.threads)
    with Report("score", args.json) as report, tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.device == "cuda" and not torch.cuda.is_available():
            report.skip(f"scoring, {args.shape} on a GPU", "no CUDA device is usable here")
            return
        shape = shape_named(args.shape, args.layers)
        context = shape.model.max_positions
        if args.text:
            documents = text_documents(args.text, args.tokenizer, args.tokens, context_tokens=context)
        else:
            documents = random_documents(args.tokens, vocab_size=shape.vocab_size, context_tokens=context)
        Path(folder).mkdir(exist_ok=True)
        write_priors(folder, args)
        lengths = [len(ids_T) for ids_T in documents]
        num_tokens, flops = sum(lengths), forward_flops(shape, lengths)
        report.say(
            f"{shape.words}, {len(documents)} documents, {num_tokens} tokens a process, {args.processes} "
            f"processes of {args.threads} threads, batches of {args.batch_tokens} tokens, "
            f"{flops / num_tokens / 1e6:.0f} MFLOP a token"
        )
        measured = measure(folder, documents, args, report)
        report_all(report, measured, num_tokens * args.processes, flops * args.processes)


if __name__ == "__main__":
    main()
