"""Building, opening and reading indexed datasets: ours against megatron-core's, in one run.

    python benchmarks/dataset.py
    python benchmarks/dataset.py --megabytes 4000 --folder /scratch     # a disk of one's own choice
    python benchmarks/dataset.py --cold                                 # reading what memory has no copy of

Random ids in documents as long as those of web text, two bytes an id. Both builders are given the same int32
arrays and must write the same bytes. Ours appears by rename after it was hashed and synced to the disk,
megatron-core's is left to the operating system; "megatron-core, then synced" puts them on a par.

Samples: `GPTDataset`'s, tokens and labels and masks of one sequence, in order, from our blend (which adds
epochs, counters and blends around it) and from megatron-core's builder. Building their index "cold" writes
the cache, "warm" finds it.

Limits: one write of the same bytes with a sync; copying memory (a sample is 28 bytes a token).
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import logging
import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
from measuring import (  # noqa: E402
    MB,
    Report,
    Seconds,
    copy_bytes_per_second,
    forget_cached,
    in_turns,
    median_ratio,
    parser,
    write_file,
)

from megatron_tokedit.config.sections import DataConfig, SourceConfig  # noqa: E402
from megatron_tokedit.dataset import IndexedDatasetWriter  # noqa: E402
from megatron_tokedit.dataset.blend import _dataset_config, build_datasets  # noqa: E402
from megatron_tokedit.dataset.reader import IndexedDataset  # noqa: E402
from megatron_tokedit.dataset.sources import inspect_sources  # noqa: E402

VOCAB_SIZE = 50257
SPEC = {"vocab_size": VOCAB_SIZE, "eod": VOCAB_SIZE - 1, "fingerprint": "benchmark"}
BYTES_PER_SAMPLE_TOKEN = 8 + 8 + 8 + 4
"""Tokens, labels, positions, loss mask."""
SEED = 1234


def make_documents(megabytes: float) -> list[np.ndarray]:
    """Documents of int32 ids that fill so many megabytes at two bytes an id."""
    rng = np.random.default_rng(0)
    num_tokens = int(megabytes * MB / 2)
    ids = rng.integers(0, VOCAB_SIZE - 1, num_tokens, dtype=np.int32)
    lengths = np.exp(rng.normal(5.6, 0.9, num_tokens // 100)).astype(np.int64).clip(1)
    ends = np.cumsum(lengths)
    return np.split(ids, ends[ends < num_tokens])


def build_ours(documents: list[np.ndarray], prefix: Path) -> None:
    """Our writer."""
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for ids in documents:
            writer.add_document([ids])
        writer.finalize()


def build_core(documents: list[np.ndarray], prefix: Path, *, is_synced: bool) -> None:
    """megatron-core's builder, as Megatron-LM's preprocess_data.py calls it."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    if is_synced:
        for suffix in (".bin", ".idx"):
            with open(f"{prefix}{suffix}", "rb") as file:
                os.fsync(file.fileno())


def core_blend(prefix: Path, data: DataConfig, cache: Path, args: argparse.Namespace, num: int) -> Any:
    """megatron-core's own way to a ``GPTDataset``."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset

    config = _dataset_config(data, args.seq_length, SEED, SPEC)
    config = dataclasses.replace(config, path_to_cache=str(cache))
    return BlendedMegatronDatasetBuilder(GPTDataset, [num, None, None], lambda: True, config).build()[0]


class Folder:
    """Where everything lies, and what each contestant does there."""

    def __init__(self, root: Path, args: argparse.Namespace) -> None:
        self.root, self.args = root, args
        self.ours, self.core = root / "ours", root / "core"
        self.data = DataConfig(train=[SourceConfig(name="one", prefix=str(self.ours))])

    def samples_of_epoch(self) -> int:
        """Whole samples in the dataset."""
        return (IndexedDataset(str(self.ours)).num_tokens - 1) // self.args.seq_length

    def our_blend(self, cache: Path, num: int) -> Any:
        """Our way to training samples, inspection of the sources included."""
        infos = inspect_sources(self.data, tokenizer_spec=SPEC, seq_length=self.args.seq_length)
        return build_datasets(
            self.data,
            infos,
            num_train_samples=num,
            seq_length=self.args.seq_length,
            seed=SEED,
            tokenizer_spec=SPEC,
            cache_dir=cache,
        ).train

    def core_blend(self, cache: Path, num: int) -> Any:
        """megatron-core's."""
        return core_blend(self.ours, self.data, cache, self.args, num)


def time_building(report: Report, folder: Folder, documents: list[np.ndarray]) -> None:
    """Megabytes a second of both builders, and of writing alone."""
    flat = np.concatenate(documents).astype(np.uint16)
    num_mb = flat.nbytes / MB
    seconds = in_turns(
        {
            "ours": lambda: build_ours(documents, folder.ours),
            "megatron-core": lambda: build_core(documents, folder.core, is_synced=False),
            "megatron-core, then synced": lambda: build_core(documents, folder.core, is_synced=True),
            "one write, synced": lambda: write_file(folder.root / "raw", [memoryview(flat)]),
        },
        rounds=folder.args.rounds,
    )
    (folder.root / "raw").unlink()
    rows = [(name, num_mb / statistics.median(v), num_mb / min(v)) for name, v in seconds.items()]
    report.table(f"building {num_mb:.0f} MB, {len(documents)} documents", ("MB/s", "best"), rows)
    same = all(filecmp.cmp(f"{folder.ours}{end}", f"{folder.core}{end}", False) for end in (".bin", ".idx"))
    report.say(f"the bytes of both: {'the same' if same else 'DIFFERENT'}")
    core = seconds["megatron-core, then synced"]
    report.ratio("build: ours / megatron-core, synced", median_ratio(core, seconds["ours"]), "rate")
    report.limit("writing and syncing", num_mb / min(seconds["one write, synced"]), "MB/s")


def time_opening(report: Report, folder: Folder) -> None:
    """Milliseconds to open the dataset and to have training samples, without and with a cached index."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset as CoreDataset

    num = folder.samples_of_epoch()
    caches = {"ours": folder.root / "cache_ours", "core": folder.root / "cache_core"}

    def without(cache: Path, build: Callable[[Path, int], Any]) -> None:
        shutil.rmtree(cache, ignore_errors=True)
        build(cache, num)

    seconds = in_turns(
        {
            "open: ours": lambda: IndexedDataset(str(folder.ours)),
            "open: megatron-core": lambda: CoreDataset(str(folder.core)),
            "samples, cold: ours": lambda: without(caches["ours"], folder.our_blend),
            "samples, cold: megatron-core": lambda: without(caches["core"], folder.core_blend),
            "samples, warm: ours": lambda: folder.our_blend(caches["ours"], num),
            "samples, warm: megatron-core": lambda: folder.core_blend(caches["core"], num),
        },
        rounds=folder.args.rounds,
    )
    rows = [(name, statistics.median(v) * 1e3, min(v) * 1e3) for name, v in seconds.items()]
    report.table("opening", ("ms", "best"), rows)
    for part in ("open", "samples, cold", "samples, warm"):
        value = median_ratio(seconds[f"{part}: megatron-core"], seconds[f"{part}: ours"])
        report.ratio(f"{part}: megatron-core / ours", value, "time; higher is better")


def time_reading(report: Report, folder: Folder) -> None:
    """Samples and sequences a second."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset as CoreDataset

    args = folder.args
    num = folder.samples_of_epoch()
    ours, core = folder.our_blend(folder.root / "cache_ours", num), None
    core = folder.core_blend(folder.root / "cache_core", num)
    our_sequences, core_sequences = IndexedDataset(str(folder.ours)), CoreDataset(str(folder.core))
    picked = np.random.default_rng(1).integers(0, our_sequences.num_sequences, args.reads).tolist()
    samples = list(range(min(num, args.reads)))
    assert all(np.array_equal(ours[i]["tokens"], core[i]["tokens"]) for i in samples[:8]), "other samples"

    def cold(paths: list[Path], read: Callable[[], object]) -> Callable[[], object]:
        def forget_and_read() -> None:
            forget_cached(paths)
            read()

        return forget_and_read if args.cold else read

    ours_bin, core_bin = [Path(f"{folder.ours}.bin")], [Path(f"{folder.core}.bin")]
    seconds = in_turns(
        {
            "samples: ours": cold(ours_bin, lambda: [ours[i] for i in samples]),
            "samples: megatron-core": cold(ours_bin, lambda: [core[i] for i in samples]),
            "documents at random: ours": cold(
                ours_bin, lambda: [our_sequences.sequence(i).copy() for i in picked]
            ),
            "documents at random: megatron-core": cold(
                core_bin, lambda: [core_sequences[i].copy() for i in picked]
            ),
        },
        rounds=args.rounds,
    )
    report_reading(report, seconds, len(samples), args)


def report_reading(report: Report, seconds: Seconds, num_samples: int, args: argparse.Namespace) -> None:
    """Print the table of :func:`time_reading`."""
    rows = []
    for name, values in seconds.items():
        amount = num_samples if name.startswith("samples") else args.reads
        rows.append((name, amount / statistics.median(values), amount / min(values)))
    title = f"reading, {args.seq_length} tokens a sample" + (", cold" if args.cold else "")
    report.table(title, ("a second", "best"), rows)
    for part in ("samples", "documents at random"):
        value = median_ratio(seconds[f"{part}: megatron-core"], seconds[f"{part}: ours"])
        report.ratio(f"{part}: ours / megatron-core", value, "rate")
    copying = copy_bytes_per_second()
    report.limit("copying memory", copying / 1e9, "GB/s")
    report.limit("samples that copying allows", copying / (BYTES_PER_SAMPLE_TOKEN * args.seq_length), "/s")


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    made = parser(__doc__)
    made.add_argument("--megabytes", type=float, default=100.0, help="of ids")
    made.add_argument("--seq-length", type=int, default=2048, help="tokens a sample")
    made.add_argument("--reads", type=int, default=5000, help="samples, and documents, a round")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--cold", action="store_true", help="have the files read from the disk")
    made.add_argument("--folder", help="on the disk to measure; default: the temporary one")
    return made.parse_args()


def main() -> None:
    """Run the contestants and print the tables."""
    args = parse()
    logging.getLogger("megatron_tokedit").setLevel(logging.ERROR)  # there is no manifest, and need not be
    with Report("dataset", args.json) as report, tempfile.TemporaryDirectory(dir=args.folder) as root:
        folder = Folder(Path(root), args)
        time_building(report, folder, make_documents(args.megabytes))
        time_opening(report, folder)
        time_reading(report, folder)


if __name__ == "__main__":
    main()
