"""What editing costs beside scoring: our candidates and edits, and those of a plain loop.

    python benchmarks/editing.py                                      # GPT-2 124M, random weights, float32
    python benchmarks/editing.py --dtype bfloat16 --eligible 0.3
    python benchmarks/editing.py --shape 8b --dtype bfloat16 --device cuda --tokens 200000
    python benchmarks/editing.py --shape 8b --backend megatron --dtype fp8 --device cuda --tokens 200000

One scorer, one process; the contestants take turns over the same documents. "Candidates" are the eight most
probable ids, with their log-probabilities, of the share of tokens that --eligible says. "Edit alone" draws
and rebuilds documents whose scores are there already; it is what a faster prior leaves standing.

"Plain" is a Hugging Face loop in batches of similar length: full float32 log-softmax, top-8 and
`torch.multinomial` of the eligible rows, ids put back with `torch.where` (no journal, no statistics).

Limit: where only log-probabilities are kept, candidates need the logits of the eligible rows once more, and
nothing else of that size; so many operations, of those of scoring, the overhead cannot go below.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from measuring import Report, in_turns, median_ratio, parser, synchronize  # noqa: E402
from priors import (  # noqa: E402
    NUM_CANDIDATES,
    TEMPERATURE,
    Documents,
    Editing,
    load_prior,
    padded,
    plain_model,
    random_documents,
    similar_batches,
    write_prior,
)
from shapes import SHAPES, shape_named  # noqa: E402

from megatron_tokedit.errors import TokeditError  # noqa: E402
from megatron_tokedit.scoring.cost import count_flops  # noqa: E402

Contestants = dict[str, Callable[[], object]]


def plain(
    folder: str, documents: Documents, args: argparse.Namespace, device: torch.device, threshold: float | None
) -> Callable[[], object]:
    """A plain loop; with a threshold it edits too."""
    model = plain_model(folder, args.dtype, device)
    batches = similar_batches(documents, args.batch_tokens)

    @torch.inference_mode()
    def run() -> None:
        for group in batches:
            ids_BT, mask_BT = padded(group, device)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            logprobs_BTV = logits_BTV.float().log_softmax(-1)
            targets_BT = ids_BT[:, 1:]
            logprobs_BT = logprobs_BTV.gather(2, targets_BT[..., None])[..., 0]
            if threshold is not None:
                is_eligible_BT = (logprobs_BT.exp() >= threshold) & mask_BT[:, 1:].bool()
                logprobs_EK, ids_EK = logprobs_BTV[is_eligible_BT].topk(NUM_CANDIDATES)
                drawn_E = torch.multinomial((logprobs_EK / TEMPERATURE).softmax(-1), 1)
                new_BT = targets_BT.masked_scatter(is_eligible_BT, ids_EK.gather(1, drawn_E)[:, 0])
                torch.where(is_eligible_BT, new_BT, targets_BT).cpu()
            logprobs_BT.cpu()

    return run


def contestants(
    folder: str, documents: Documents, args: argparse.Namespace
) -> tuple[Contestants, float, torch.device]:
    """What takes turns, the share of scoring's operations that candidates need, and the device."""
    scorer = load_prior(
        folder,
        dtype=args.dtype,
        device=args.device,
        batch_tokens=args.batch_tokens,
        logits_bytes=args.logits_bytes,
    )
    device = scorer.backbone.device
    editing = Editing(scorer, documents, args.eligible)
    scores = editing.score()
    eligible, _ = editing.edit(scores)
    operations = 2 * eligible * scorer.backbone.head.weight_VH.numel()
    made: Contestants = {
        "scoring": lambda: scorer.score(documents),
        "scoring + candidates": editing.score,
        "scoring + candidates + edit": editing.run,
        "edit alone": lambda: editing.edit(scores),
    }
    if args.backend == "hf" and args.dtype != "fp8" and args.plain:
        made["plain scoring"] = plain(folder, documents, args, device, None)
        made["plain scoring + edit"] = plain(folder, documents, args, device, editing.threshold)
    return made, operations / count_flops(scorer, [len(ids) for ids in documents]), device


def measure(report: Report, folder: str, documents: Documents, args: argparse.Namespace) -> None:
    """Run and report."""
    made, needed_share, device = contestants(folder, documents, args)
    seconds = in_turns(made, rounds=args.rounds, finish=lambda: synchronize(device))
    num_tokens = sum(map(len, documents))
    rows = []
    for name, values in seconds.items():
        base = {"edit alone": None, "plain scoring + edit": "plain scoring"}.get(name, "scoring")
        over = f"{median_ratio(values, seconds[base]) - 1:+.1%}" if base and base != name else "-"
        rows.append((name, num_tokens / statistics.median(values), num_tokens / min(values), over))
    report.table(f"{args.shape}, {args.dtype}", ("tokens/s", "best", "overhead"), rows)
    whole, scoring = seconds["scoring + candidates + edit"], seconds["scoring"]
    report.ratio(
        f"editing / scoring alone, {args.dtype}", median_ratio(whole, scoring), "time; target 1.03 on a GPU"
    )
    report.ratio(
        "edit alone / scoring, tokens/s", median_ratio(scoring, seconds["edit alone"]), "higher is better"
    )
    if "plain scoring" in seconds:
        report.ratio(
            f"plain editing loop / ours, {args.dtype}",
            median_ratio(seconds["plain scoring + edit"], whole),
            "time; higher is better",
        )
    report.limit("logits of the eligible rows, of scoring's operations,", 100 * needed_share, "%")


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="124m")
    made.add_argument("--layers", type=int, help="fewer layers than the shape has")
    made.add_argument("--backend", choices=("hf", "megatron"), default="hf")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "fp8"), default="float32")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--tokens", type=int, default=4000)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--batch-tokens", type=int, default=2048)
    made.add_argument("--logits-bytes", type=int, default=128 << 20)
    made.add_argument("--eligible", type=float, default=0.15, help="share of tokens that are edited")
    made.add_argument("--no-plain", dest="plain", action="store_false", help="leave out the plain loop")
    return made.parse_args()


def main() -> None:
    """Run the contestants and print the table."""
    args = parse()
    torch.set_num_threads(args.threads)
    with Report("editing", args.json) as report, tempfile.TemporaryDirectory() as folder:
        if args.device == "cuda" and not torch.cuda.is_available():
            report.skip(f"{args.shape} on a GPU", "no CUDA device is usable here")
            return
        shape = shape_named(args.shape, args.layers)
        documents = random_documents(
            args.tokens, vocab_size=shape.vocab_size, context_tokens=shape.model.max_positions
        )
        report.say(
            f"{shape.words}, {len(documents)} documents, {sum(map(len, documents))} tokens, "
            f"{args.threads} threads, batches of {args.batch_tokens} tokens, {args.eligible:.0%} eligible"
        )
        try:
            write_prior(folder, shape, backend=args.backend, device=torch.device(args.device))
            measure(report, folder, documents, args)
        except TokeditError as error:
            report.skip(f"{args.shape}, {args.dtype}", str(error))


if __name__ == "__main__":
    main()
