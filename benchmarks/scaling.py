"""The preprocessing job with 1, 2 .. n processes: its efficiency against one process, times n.

    python benchmarks/scaling.py                      # tokenizing alone, then editing with a small prior
    python benchmarks/scaling.py --workers 1 2 4 8 16 --megabytes 200 --prior-kilobytes 4000
    python benchmarks/scaling.py --only tokenize

Each job runs in a fresh process, on a part of the text and on all of it, taking turns; a rate is net: what
the job does more for more text, without its start (imports, tokenizer, prior), which the table shows apart.

Limit: the same number of jobs of one process each, side by side, each with a text and an output of its own.
What they lose against n times one is the machine's (memory bandwidth, clock, other users of its cores); what
one job with n workers loses beyond that is ours. Where other processes compete for the cores, take the best.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
warnings.filterwarnings("ignore")

from corpus import DOCUMENT_CHARACTERS, gather, train_tokenizer, write_jsonl  # noqa: E402
from measuring import MB, Report, net_rate, number, parser  # noqa: E402

PART = 4
"""The part of the text that the short job gets is one in so many documents."""
VOCAB_SIZE = 2048
EDIT_THRESHOLD = 0.00063
"""About one token in seven is above it: logits of the prior's random weights have a deviation of 0.28."""
Times = dict[tuple[str, str], list[float]]


def run_child(job: dict[str, Any]) -> None:
    """Do one job in this process and print its seconds and tokens as JSON."""
    from megatron_tokedit.config.preprocess import PreprocessConfig
    from megatron_tokedit.pipeline import job as pipeline_job

    start = time.perf_counter()
    result = pipeline_job.run(PreprocessConfig(**job))
    assert result.totals is not None
    print(json.dumps({"seconds": time.perf_counter() - start, "tokens": result.totals.keys["text"].tokens}))


def run_jobs(jobs: list[dict[str, Any]]) -> tuple[int, float]:
    """Jobs side by side, each in a fresh process; tokens of all, and seconds of the slowest."""
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for job in jobs
    ]
    answers = []
    for child, job in zip(children, jobs, strict=True):
        out, err = child.communicate()
        if child.returncode:
            raise SystemExit(f"{job} failed:\n{err}")
        answers.append(json.loads(out.splitlines()[-1]))
    return sum(answer["tokens"] for answer in answers), max(answer["seconds"] for answer in answers)


def write_prior_folder(folder: Path, vocab_size: int) -> str:
    """A Llama of the quickstart's shape over the tokenizer's vocabulary, random weights."""
    import torch
    from priors import write_hf
    from shapes import SHAPES, Shape

    shape = SHAPES["quickstart"]
    shape = Shape(shape.name, shape.model, vocab_size, shape.words)
    write_hf(str(folder), shape, device=torch.device("cpu"))
    return str(folder)


def cut(documents: list[str]) -> list[str]:
    """Documents of at most so many characters, so that few of them still are units enough for all."""
    step = DOCUMENT_CHARACTERS
    return [text[start : start + step] for text in documents for start in range(0, len(text), step)]


class Contest:
    """One kind of job over one text.

    Args:
        kind: its name.
        settings: of the job, besides input, output and workers.
        documents: the text.
        folder: for inputs and outputs.
    """

    def __init__(self, kind: str, settings: dict[str, Any], documents: list[str], folder: Path) -> None:
        self.kind, self._settings, self._folder = kind, settings, folder
        self._texts = {"part": documents[::PART], "all": documents}
        self._num_runs = 0

    def jobs(self, size: str, workers: int, copies: int) -> list[dict[str, Any]]:
        """Settings of jobs side by side over the text, a share each, with outputs of their own."""
        made = []
        for copy in range(copies):
            self._num_runs += 1
            source = self._folder / f"{self.kind}_{size}_{copy}_of_{copies}.jsonl"
            if not source.exists():
                write_jsonl(self._texts[size][copy::copies], source)
            output = self._folder / f"{self.kind}_out{self._num_runs}"
            job = {"input": [str(source)], "output_prefix": str(output), "workers": workers}
            made.append({**self._settings, **job})
        return made

    def measure(self, workers: list[int], rounds: int) -> tuple[Times, dict[str, int]]:
        """Seconds of every (contestant, size), and tokens of a size."""
        contestants = {f"{n} workers": (n, 1) for n in workers}
        contestants |= {f"{n} jobs side by side": (1, n) for n in workers if n > 1}
        times: Times = {(name, size): [] for name in contestants for size in self._texts}
        tokens: dict[str, int] = {}
        for _ in range(rounds):
            for name, (num_workers, copies) in contestants.items():
                for size in self._texts:
                    tokens[size], seconds = run_jobs(self.jobs(size, num_workers, copies))
                    times[name, size].append(seconds)
        return times, tokens


def report_contest(report: Report, contest: Contest, workers: list[int], rounds: int) -> None:
    """Measure and print one kind of job."""
    times, tokens = contest.measure(workers, rounds)
    best = {key: min(values) for key, values in times.items()}
    rates, rows = {}, []
    for name in dict.fromkeys(name for name, _ in times):
        part, whole = best[name, "part"], best[name, "all"]
        rates[name] = net_rate((tokens["part"], part), (tokens["all"], whole))
        num = int(name.split()[0])
        efficiency = rates[name] / (num * rates[f"{workers[0]} workers"] / workers[0])
        start = whole - tokens["all"] / rates[name]
        rows.append((name, tokens["all"] / whole, rates[name], efficiency, start))
    report.table(contest.kind, ("tokens/s", "net", "efficiency", "start s"), rows)
    if any(math.isnan(rate) for rate in rates.values()):
        report.skip(f"{contest.kind}: efficiency", "too little text to tell work from start; give more")
        return
    for num in workers[1:]:
        ours, apart = rates[f"{num} workers"], rates[f"{num} jobs side by side"]
        one = rates[f"{workers[0]} workers"] / workers[0]
        report.ratio(
            f"{contest.kind}: {num} workers / {num} x one", ours / (num * one), "net rate; 1 is perfect"
        )
        report.limit(f"{contest.kind}, {num} jobs side by side:", apart / (num * one), f"of {num} x one")


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    made = parser(__doc__)
    cores = len(os.sched_getaffinity(0))
    steps = sorted({1, *(2**i for i in range(1, 10) if 2**i <= cores), cores})
    made.add_argument(
        "--workers", type=int, nargs="+", default=steps, help="ascending; the first is the base"
    )
    made.add_argument("--megabytes", type=float, default=20.0, help="of text, for tokenizing alone")
    made.add_argument("--prior-kilobytes", type=float, default=400.0, help="of text, for editing")
    made.add_argument("--text", nargs="+", metavar="FILE", help="txt, jsonl or py; default: Python sources")
    made.add_argument("--rounds", type=int, default=1)
    made.add_argument("--only", choices=("tokenize", "edit"))
    made.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    """Run the jobs and print the tables."""
    args = parse()
    if args.child:
        run_child(args.child)
        return
    with Report("scaling", args.json) as report, tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        if len(args.workers) < 2:
            report.skip("scaling over processes", f"one usable core (--workers {args.workers[0]})")
            return
        documents = gather(args.text, args.megabytes)
        tokenizer = train_tokenizer(
            documents[:: max(1, len(documents) // 400)], folder / "tokenizer", VOCAB_SIZE
        )
        common = {
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": tokenizer,
            "append_eod": True,
        }
        kinds = {"tokenize": ({**common, "edit_strategy": "none", "unit_bytes": 500_000}, documents)}
        few = cut(gather(args.text, args.prior_kilobytes / 1e3))
        if args.only != "tokenize":
            prior = write_prior_folder(folder / "prior", VOCAB_SIZE)
            editing = {"prior": prior, "edit_threshold": EDIT_THRESHOLD, "unit_bytes": 20_000}
            kinds["edit"] = ({**common, **editing}, few)
        for kind, (settings, texts) in kinds.items():
            if args.only in (None, kind):
                size = sum(map(len, texts)) / MB
                report.say(f"{kind}: {number(size)} MB of text in {len(texts)} documents")
                report_contest(report, Contest(kind, settings, texts, folder), args.workers, args.rounds)


if __name__ == "__main__":
    main()
