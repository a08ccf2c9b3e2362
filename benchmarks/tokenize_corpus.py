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
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
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

DOCUMENT_CHARACTERS = 2000
GROUP_CHARACTERS = 512 << 10
VOCAB_SIZE = 32000
MB, GB = 1e6, 1e9


def documents_of(path: Path) -> Iterator[str]:
    """Documents of a file: each string of a JSON record, each source file, or lines put together."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    if path.suffix in (".jsonl", ".ndjson"):
        for line in text.splitlines():
            yield from (value for value in orjson.loads(line).values() if isinstance(value, str))
        return
    if path.suffix == ".py":
        yield text
        return
    lines, size = list[str](), 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def gather(args: argparse.Namespace) -> list[str]:
    """Up to ``--megabytes`` of documents of which none occurs twice."""
    folders = sysconfig.get_paths()
    files = args.text or sorted(Path(folders["purelib"]).rglob("*.py")) + sorted(
        Path(folders["stdlib"]).glob("*.py")
    )
    seen, documents, size = set[bytes](), list[str](), 0
    for path in files:
        for document in documents_of(Path(path)):
            digest = hashlib.sha256(document.encode()).digest()
            if not document.strip() or digest in seen:
                continue
            seen.add(digest)
            documents.append(document)
            size += len(document)
            if size >= args.megabytes * MB:
                return documents
    return documents


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


def time_encoders(args: argparse.Namespace, documents: list[str]) -> float:
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
    print(f"{'encoding alone, one core':36}{'M tokens/s':>12}{'MB/s':>8}{'of library':>12}")
    for name, spent in seconds.items():
        rate = tokens / spent
        print(f"{name:36}{rate / 1e6:12.3f}{num_bytes / spent / MB:8.1f}{rate / base:12.2f}")
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
        inputs[name].write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
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


def print_jobs(results: Results, base: float, itemsize: int) -> int:
    """Print the table of whole jobs; returns the number of tokens of the text."""
    print(
        f"\n{'whole jobs':36}{'M tokens/s':>12}{'net':>8}{'of library':>12}{'a worker':>10}{'start s':>9}"
        f"{'peak MB 0.1x':>14}{'1x':>6}"
    )
    for name, sizes in results.items():
        seconds = {size: statistics.median(r["seconds"] for r in runs) for size, runs in sizes.items()}
        peaks = {size: max(r["peak_bytes"] for r in runs) for size, runs in sizes.items()}
        tokens = {size: runs[0]["bytes"] / itemsize for size, runs in sizes.items()}
        workers = int(name.split()[-2])
        more = seconds["all"] - seconds["part"]
        net = (tokens["all"] - tokens["part"]) / more if more > 0.5 else float("nan")  # too short to tell
        print(
            f"{name:36}{tokens['all'] / seconds['all'] / 1e6:12.3f}{net / 1e6:8.3f}{net / base:12.2f}"
            f"{net / base / workers:10.2f}{seconds['all'] - tokens['all'] / net:9.1f}"
            f"{peaks['part'] / MB:14.0f}{peaks['all'] / MB:6.0f}"
        )
    sums = {run["sha256"] for sizes in results.values() for run in sizes["all"]}
    print(f"ids written by all of them: {'the same bytes' if len(sums) == 1 else 'DIFFERENT'}")
    return int(tokens["all"])


def print_limits(tokens: int, num_bytes: int, work: Path) -> None:
    """What the machine allows around the tokenizer: parsing, copying, writing."""
    source = work / "all.jsonl"
    start = time.perf_counter()
    with source.open("rb") as lines:
        for line in lines:
            orjson.loads(line)
    parsing = time.perf_counter() - start
    block = np.ones(64 << 20, np.uint8)
    copies = []
    for _ in range(5):
        start = time.perf_counter()
        block.copy()
        copies.append(time.perf_counter() - start)
    start = time.perf_counter()
    with (work / "written").open("wb") as file:
        file.write(block)
        os.fsync(file.fileno())
    writing = time.perf_counter() - start
    print(
        f"\nlimits of this machine: reading and parsing the lines {tokens / parsing / 1e6:.0f} M tokens/s "
        f"({num_bytes / parsing / MB:.0f} MB/s of text, {num_bytes / tokens:.2f} bytes a token); "
        f"copying memory {block.nbytes / min(copies) / GB:.1f} GB/s; writing and syncing 2-byte ids "
        f"{block.nbytes / writing / 2 / 1e6:.0f} M tokens/s"
    )


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer",
        help="a Hugging Face tokenizer's folder (GPT-2's for the reference)",
    )
    parser.add_argument("--text", nargs="+", metavar="FILE", help="txt, jsonl or py; default: Python sources")
    parser.add_argument("--megabytes", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only the whole jobs with this in their name")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def train_tokenizer(documents: list[str], folder: Path) -> str:
    """A byte-level BPE of GPT-2's kind, for a machine that has none at hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    return str(folder)


def main() -> None:
    """Run the contestants and print the tables."""
    args = parse()
    if args.child:
        run_child(args.child)
        return
    from megatron_tokedit.dataset import best_dtype
    from megatron_tokedit.tokenizers import load_tokenizer

    documents = gather(args)
    num_bytes = sum(len(document.encode()) for document in documents)
    print(f"text: {num_bytes / GB:.4f} GB in {len(documents)} documents\n")
    with tempfile.TemporaryDirectory() as folder:
        if not args.tokenizer:
            args.tokenizer = train_tokenizer(documents[::10], Path(folder) / "tokenizer")
            print(f"tokenizer: a byte-level BPE of {VOCAB_SIZE} ids, trained on a tenth of the text\n")
        base = time_encoders(args, documents[::10])
        itemsize = np.dtype(
            best_dtype(load_tokenizer("HuggingFaceTokenizer", args.tokenizer).vocab_size)
        ).itemsize
        tokens = print_jobs(time_jobs(args, documents, Path(folder)), base, itemsize)
        print_limits(tokens, num_bytes, Path(folder))


if __name__ == "__main__":
    main()
