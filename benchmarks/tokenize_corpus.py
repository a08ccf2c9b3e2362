"""Turning text into a dataset: our pipeline without editing, the tokenizer library alone, Megatron-LM's loop.

    python benchmarks/tokenize_corpus.py                # sources of this Python's packages, a small tokenizer
    python benchmarks/tokenize_corpus.py --tokenizer PATH --text a.txt b.jsonl --rounds 3
    python benchmarks/tokenize_corpus.py --tokenizer PATH --megabytes 300 --only gigatoken --workers 1

(Not called tokenize.py: a script's folder comes first in the search path, and the standard library has a
module of that name.) No text occurs twice. Encoding alone is timed with the contestants taking turns every
512 KiB, on one core, over a tenth of the text. Whole jobs take turns in processes of their own, each on a
tenth of the text and on all of it, so that a job's net rate is that of what it does more for more text,
without its start. A gigatoken job is over in seconds: give it text enough. "Megatron-LM's loop" is the work
of its tools/preprocess_data.py: a pool that parses and encodes line by line, and a parent that adds each
document to megatron-core's IndexedDatasetBuilder. Where gigatoken (the extra `fast`) is installed, our side
runs with it and without it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import orjson
import psutil
from corpus import VOCAB_SIZE, gather, train_tokenizer, write_jsonl
from measuring import GB, MB, Report, copy_bytes_per_second, net_rate, parser, write_file

GROUP_CHARACTERS = 512 << 10


def groups_of(documents: list[str]) -> Iterator[list[str]]:
    """Documents in batches of about 512 KiB, as the pipeline takes them."""
    group, size = list[str](), 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def hide_gigatoken(folder: Path) -> dict[str, str]:
    """An environment in which gigatoken is not found, for child processes and theirs."""
    folder.mkdir(exist_ok=True)
    (folder / "gigatoken.py").write_text('raise ModuleNotFoundError("hidden", name="gigatoken")\n')
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def encoders(tokenizer_path: str) -> dict[str, Callable[[list[str]], list[Any]]]:
    """What encodes a batch: the library, ours on top of it, ours with gigatoken where it is there."""
    from transformers import AutoTokenizer

    from megatron_tokedit.tokenizers import load_tokenizer

    backend = AutoTokenizer.from_pretrained(tokenizer_path).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    contestants: dict[str, Callable[[list[str]], list[Any]]] = {
        "library alone": lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts)]
    }
    found = importlib.util.find_spec("gigatoken") is not None
    sys.modules["gigatoken"] = None  # type: ignore[assignment] # what import finds where it is not installed
    ours = load_tokenizer("HuggingFaceTokenizer", tokenizer_path)
    contestants[f"ours, {ours.encoder}"] = ours.encode_batch
    del sys.modules["gigatoken"]
    if found:
        fast = load_tokenizer("HuggingFaceTokenizer", tokenizer_path)
        contestants[f"ours, {fast.encoder}"] = fast.encode_batch
    return contestants


def time_encoders(report: Report, args: argparse.Namespace, documents: list[str]) -> float:
    """Print the table of encoding alone; returns the library's tokens/s."""
    contestants = encoders(args.tokenizer)
    seconds = dict.fromkeys(contestants, 0.0)
    tokens, num_bytes = 0, sum(len(document.encode()) for document in documents)
    for group in groups_of(documents):
        ids: dict[str, list[Any]] = {}
        for name, encode in contestants.items():
            start = time.perf_counter()
            ids[name] = encode(group)
            seconds[name] += time.perf_counter() - start
        first = ids["library alone"]
        tokens += sum(map(len, first))
        assert all(all(map(np.array_equal, first, other)) for other in ids.values()), "ids differ"
    base = tokens / seconds["library alone"]
    rows = [
        (name, tokens / spent / 1e6, num_bytes / spent / MB, tokens / spent / base)
        for name, spent in seconds.items()
    ]
    report.table("encoding alone, one core", ("M tokens/s", "MB/s", "of library"), rows)
    for name, _, _, share in rows[1:]:
        report.ratio(f"encoding: {name} / library alone", share, "rate")
    return base


def _start_encoder(tokenizer_path: str, append_eod: bool) -> None:
    from transformers import AutoTokenizer

    _start_encoder.state = (AutoTokenizer.from_pretrained(tokenizer_path), append_eod)  # type: ignore[attr-defined]


def _encode_line(line: str) -> tuple[list[int], list[int], int]:
    tokenizer, append_eod = _start_encoder.state  # type: ignore[attr-defined]
    ids: list[int] = list(tokenizer(json.loads(line)["text"]).input_ids)
    if ids and append_eod:
        ids.append(tokenizer.eos_token_id)
    return ids, [len(ids)], len(line)


def megatron_job(job: dict[str, Any]) -> None:
    """The work of Megatron-LM's tools/preprocess_data.py."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    vocab_size = len(AutoTokenizer.from_pretrained(job["tokenizer"]))
    prefix = job["output"] + "_text_document"
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocab_size))
    with (
        open(job["input"], encoding="utf-8") as lines,
        multiprocessing.Pool(job["workers"], _start_encoder, (job["tokenizer"], True)) as pool,
    ):
        for ids, lengths, _ in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, lengths)
    builder.finalize(prefix + ".idx")


def our_job(job: dict[str, Any]) -> None:
    """Our pipeline, without editing."""
    from megatron_tokedit.config.preprocess import PreprocessConfig
    from megatron_tokedit.pipeline import job as pipeline_job

    config = PreprocessConfig(
        input=[job["input"]],
        output_prefix=job["output"],
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=job["tokenizer"],
        append_eod=True,
        workers=job["workers"],
        edit_strategy="none",
    )
    pipeline_job.run(config)


def _peak_bytes(pid: int | str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def run_child(job: dict[str, Any]) -> None:
    """Do one job in this process and print its seconds and the peak memory of one worker, as JSON."""
    peaks = [0]

    def watch() -> None:
        while not done.wait(0.05):
            peaks.append(
                max((_peak_bytes(child.pid) for child in psutil.Process().children(True)), default=0)
            )

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    {"megatron": megatron_job, "ours": our_job}[job["kind"]](job)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    alone = job["kind"] == "ours" and job["workers"] == 1  # then there is no process but this one
    print(json.dumps({"seconds": seconds, "peak_bytes": _peak_bytes("self") if alone else max(peaks)}))


def run_job(job: dict[str, Any], environment: dict[str, str]) -> dict[str, float]:
    """One job in a fresh process; adds the size and the checksum of the ids that it wrote."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr}")
    written = Path(job["output"] + "_text_document.bin")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    with written.open("rb") as file:
        result["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    result["bytes"] = written.stat().st_size
    written.unlink()
    return result


Results = dict[str, dict[str, list[dict[str, Any]]]]


def time_jobs(args: argparse.Namespace, documents: list[str], work: Path) -> Results:
    """Run the whole jobs, taking turns: contestant -> "part" and "all" of the text -> runs."""
    inputs = {"part": work / "part.jsonl", "all": work / "all.jsonl"}
    for name, texts in (("part", documents[::10]), ("all", documents)):
        write_jsonl(texts, inputs[name])
    hidden, plain = hide_gigatoken(work / "hidden"), dict(os.environ)
    contestants = {f"Megatron-LM's loop, {n} workers": ("megatron", n, hidden) for n in args.workers}
    contestants |= {f"pipeline, {n} workers": ("ours", n, hidden) for n in args.workers}
    if importlib.util.find_spec("gigatoken") is not None:
        contestants |= {f"pipeline, gigatoken, {n} workers": ("ours", n, plain) for n in args.workers}
    contestants = {name: parts for name, parts in contestants.items() if args.only in name}
    results: Results = {name: {"part": [], "all": []} for name in contestants}
    for _ in range(args.rounds):
        for name, (kind, workers, environment) in contestants.items():
            for size, path in inputs.items():
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    job = {"kind": kind, "workers": workers, "input": str(path), "output": f"{folder}/out"}
                    results[name][size].append(run_job({**job, "tokenizer": args.tokenizer}, environment))
    return results


def report_jobs(report: Report, results: Results, base: float, itemsize: int) -> int:
    """Print the table of whole jobs; returns the number of tokens of the text."""
    rows, nets, tokens = [], {}, {}
    for name, sizes in results.items():
        seconds = {size: statistics.median(r["seconds"] for r in runs) for size, runs in sizes.items()}
        peaks = {size: max(r["peak_bytes"] for r in runs) for size, runs in sizes.items()}
        tokens = {size: runs[0]["bytes"] / itemsize for size, runs in sizes.items()}
        workers = int(name.split()[-2])
        nets[name] = net_rate((tokens["part"], seconds["part"]), (tokens["all"], seconds["all"]))
        rows.append(
            (
                name,
                tokens["all"] / seconds["all"] / 1e6,
                nets[name] / 1e6,
                nets[name] / base,
                nets[name] / base / workers,
                seconds["all"] - tokens["all"] / nets[name],
                peaks["part"] / MB,
                peaks["all"] / MB,
            )
        )
    heads = ("M tokens/s", "net", "of library", "a worker", "start s", "peak MB 0.1x", "1x")
    report.table("whole jobs", heads, rows)
    sums = {run["sha256"] for sizes in results.values() for run in sizes["all"]}
    report.say(f"ids written by all of them: {'the same bytes' if len(sums) == 1 else 'DIFFERENT'}")
    whole = {row[0]: row[1] for row in rows}
    for name, rate in nets.items():
        baseline = f"Megatron-LM's loop, {name.split()[-2]} workers"
        if name != baseline and baseline in nets:
            report.ratio(f"{name} / Megatron-LM's loop", whole[name] / whole[baseline], "rate of whole jobs")
            if not math.isnan(rate / nets[baseline]):
                report.ratio(f"{name} / Megatron-LM's loop, net", rate / nets[baseline], "rate without start")
    return int(tokens["all"])


def report_limits(report: Report, tokens: int, num_bytes: int, work: Path) -> None:
    """What the machine allows around the tokenizer: parsing, copying, writing."""
    start = time.perf_counter()
    with (work / "all.jsonl").open("rb") as lines:
        for line in lines:
            orjson.loads(line)
    report.limit("reading and parsing the lines", tokens / (time.perf_counter() - start) / 1e6, "M tokens/s")
    report.limit("copying memory", copy_bytes_per_second() / GB, "GB/s")
    block = np.ones(64 << 20, np.uint8)
    start = time.perf_counter()
    write_file(work / "written", [memoryview(block)])
    rate = block.nbytes / (time.perf_counter() - start) / 2 / 1e6
    report.limit("writing and syncing 2-byte ids", rate, "M tokens/s")
    report.say(f"{num_bytes / tokens:.2f} bytes a token")


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    made = parser(__doc__)
    made.add_argument(
        "--tokenizer",
        help="a Hugging Face tokenizer's folder (GPT-2's for the reference)",
    )
    made.add_argument("--text", nargs="+", metavar="FILE", help="txt, jsonl or py; default: Python sources")
    made.add_argument("--megabytes", type=float, default=30.0)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--only", default="", help="only the whole jobs with this in their name")
    made.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    made.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    """Run the contestants and print the tables."""
    args = parse()
    if args.child:
        run_child(args.child)
        return
    from megatron_tokedit.dataset import best_dtype
    from megatron_tokedit.tokenizers import load_tokenizer

    with Report("tokenize_corpus", args.json) as report, tempfile.TemporaryDirectory() as name:
        documents, folder = gather(args.text, args.megabytes), Path(name)
        num_bytes = sum(len(document.encode()) for document in documents)
        report.say(f"text: {num_bytes / GB:.4f} GB in {len(documents)} documents\n")
        if not args.tokenizer:
            args.tokenizer = train_tokenizer(documents[::10], folder / "tokenizer")
            report.say(f"tokenizer: a byte-level BPE of {VOCAB_SIZE} ids, trained on a tenth of the text\n")
        base = time_encoders(report, args, documents[::10])
        dtype = best_dtype(load_tokenizer("HuggingFaceTokenizer", args.tokenizer).vocab_size)
        results = time_jobs(args, documents, folder)
        tokens = report_jobs(report, results, base, np.dtype(dtype).itemsize)
        report_limits(report, tokens, num_bytes, folder)


if __name__ == "__main__":
    main()
