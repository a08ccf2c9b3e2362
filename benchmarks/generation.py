"""Writing text: tokens/s with the key/value cache, without it, and of transformers' `generate`.

    python benchmarks/generation.py                                       # GPT-2 124M on CPU, float32
    python benchmarks/generation.py --dtype bfloat16 --batch 1 8
    python benchmarks/generation.py --device cuda --shape 8b --dtype bfloat16 --new-tokens 256

All have the same random weights and continue the same random prompts greedily, in turns, in one process: the
tokens that they choose should be the same, and the table says how many are (weights are random, so the most
probable token is often so by little, and rounding in bfloat16 decides). "Cached" is what `tools/generate.py`
does for every token, without the tokenizer's part; "no cache" is a pass over the whole text for each token.

The limit is memory: every step reads all weights of matrix products once, however many rows it has. What can
be read a second is measured by a matrix-vector product with a matrix of 256 MB in the same dtype.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from measuring import GB, Report, in_turns, median_ratio, parser, synchronize  # noqa: E402
from priors import write_megatron  # noqa: E402
from shapes import SHAPES, Shape, hf_model, shape_named  # noqa: E402

from megatron_tokedit.generation.load import RECIPES  # noqa: E402

Write = Callable[[torch.Tensor, int], torch.Tensor]
"""Prompts ``[B, T]`` and a number of new tokens -> the new ids ``[B, new]``."""
CACHED, NO_CACHE, THEIRS = "ours, cached", "ours, no cache", "transformers generate"
_MATRIX_BYTES = 256 << 20


def write_cached(model: Any) -> Write:
    """The product's decoder."""
    from megatron_tokedit.engine.decoding import CachedDecoder

    def write(ids_BT: torch.Tensor, num_new: int) -> torch.Tensor:
        decoder = CachedDecoder(model)
        chosen = [decoder.add(ids_BT.tolist()).argmax(dim=1)]
        while len(chosen) < num_new:
            chosen.append(decoder.step(chosen[-1].tolist()).argmax(dim=1))
        return torch.stack(chosen, dim=1)

    return write


def write_anew(model: Any) -> Write:
    """A pass over everything for each token."""

    @torch.inference_mode()
    def write(ids_BT: torch.Tensor, num_new: int) -> torch.Tensor:
        for _ in range(num_new):
            last_BH = model.hidden_states(ids_BT)[:, -1]
            logits_BV = torch.nn.functional.linear(last_BH, model.output_weight)[:, : model.vocab_size]
            ids_BT = torch.cat([ids_BT, logits_BV.argmax(dim=1, keepdim=True)], dim=1)
        return ids_BT[:, -num_new:]

    return write


def write_theirs(model: Any) -> Write:
    """Transformers' own loop and cache."""

    @torch.inference_mode()
    def write(ids_BT: torch.Tensor, num_new: int) -> torch.Tensor:
        written = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return written[:, -num_new:]

    return write


def twin_of(model: Any, shape: Shape, dtype: torch.dtype) -> Any:
    """The same weights as a Hugging Face model."""
    from megatron_tokedit.conversion.architecture import to_theirs
    from megatron_tokedit.conversion.layouts import Sizes
    from megatron_tokedit.conversion.registry import ARCHITECTURES

    weights = {name: parameter.detach() for name, parameter in model.gpt.named_parameters()}
    theirs = to_theirs(ARCHITECTURES[shape.model.family], Sizes(shape.model, shape.vocab_size), weights)
    with model.device:
        twin = hf_model(shape, dtype=dtype)
    missing, surplus = twin.load_state_dict(theirs, strict=False)
    twin.tie_weights()
    assert not surplus
    assert set(missing) <= {"lm_head.weight"}
    twin.generation_config.eos_token_id = None
    return twin.eval()


def weight_bytes(twin: Any) -> int:
    """Of all matrix products of a step: everything but embedding tables that are only looked up."""
    tables = {id(twin.get_input_embeddings().weight)} - {id(twin.get_output_embeddings().weight)}
    tables |= {id(p) for name, p in twin.named_parameters() if name.endswith("wpe.weight")}
    return sum(p.nbytes for p in twin.parameters() if id(p) not in tables)


def read_bytes_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second that a matrix-vector product reads, best of five."""
    width = 4096
    matrix = torch.ones(_MATRIX_BYTES // dtype.itemsize // width, width, device=device, dtype=dtype)
    vector = torch.ones(width, device=device, dtype=dtype)
    found = in_turns({"read": lambda: matrix @ vector}, rounds=5, finish=lambda: synchronize(device))
    return _MATRIX_BYTES / min(found["read"])


def measure(contestants: dict[str, Write], rows: int, args: argparse.Namespace, report: Report) -> None:
    """One batch size: all contestants in turns, and whether they write the same."""
    shape = shape_named(args.shape, args.layers)
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(rows)
    ids_BT = torch.randint(0, shape.vocab_size, (rows, args.prompt_tokens), generator=generator).to(device)
    written: dict[str, torch.Tensor] = {}

    def run(name: str) -> None:
        written[name] = contestants[name](ids_BT, args.new_tokens)

    for write in contestants.values():
        write(ids_BT, 2)
    turns = {name: (lambda name=name: run(name)) for name in contestants}
    seconds = in_turns(turns, rounds=args.rounds, warmups=0, finish=lambda: synchronize(device))
    table, best = [], args.read_rate / args.weight_bytes * rows
    for name, values in seconds.items():
        rate = rows * args.new_tokens / statistics.median(values)
        alike = (written[name] == written[CACHED]).float().mean().item()
        table.append((name, rate, f"{rate / best:.0%}", f"{alike:.0%}"))
    report.table(f"{rows} row(s)", ("tokens/s", "of the limit", "same tokens"), table)
    report.limit(
        f"{rows} row(s): reading {args.weight_bytes / GB:.2f} GB of weights a step", best, "tokens/s"
    )
    for slow, wanted in ((NO_CACHE, "time; higher is better"), (THEIRS, "time; higher is better")):
        if slow in seconds:
            value = median_ratio(seconds[slow], seconds[CACHED])
            report.ratio(f"{slow} / {CACHED}, {rows} row(s), {args.dtype}", value, wanted)


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="124m")
    made.add_argument("--layers", type=int, help="fewer layers than the shape has")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--dtype", choices=tuple(RECIPES), default="float32")
    made.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows that are written together")
    made.add_argument("--prompt-tokens", type=int, default=64)
    made.add_argument("--new-tokens", type=int, default=64)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--no-recomputation", action="store_true", help="leave out what has no cache")
    made.add_argument("--folder", help="where the model is written; default: the temporary one")
    args = made.parse_args()
    limit = SHAPES[args.shape].model.max_positions
    if args.prompt_tokens + args.new_tokens > limit:
        made.error(f"--prompt-tokens and --new-tokens: the shape has {limit} positions")
    return args


def main() -> None:
    """Load both models, run all batch sizes."""
    args = parse()
    torch.set_num_threads(args.threads)
    with Report("generation", args.json) as report, tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.device == "cuda" and not torch.cuda.is_available():
            report.skip(f"generation, {args.shape} on a GPU", "no CUDA device is usable here")
            return
        from megatron_tokedit.engine.inference import load_language_model

        shape, dtype = shape_named(args.shape, args.layers), getattr(torch, args.dtype)
        write_megatron(folder, shape, recipe=RECIPES[args.dtype])
        model = load_language_model(folder, device=args.device, precision=RECIPES[args.dtype])
        twin = twin_of(model, shape, dtype)
        args.weight_bytes = weight_bytes(twin)
        args.read_rate = read_bytes_per_second(torch.device(args.device), dtype)
        report.say(
            f"{shape.words}, {args.dtype}, {args.prompt_tokens} + {args.new_tokens} tokens a row, "
            f"{args.threads} thread(s)"
        )
        report.limit(f"reading memory, {args.dtype}", args.read_rate / GB, "GB/s")
        contestants = {CACHED: write_cached(model), THEIRS: write_theirs(twin)}
        if not args.no_recomputation:
            contestants[NO_CACHE] = write_anew(model)
        start = time.perf_counter()
        for rows in args.batch:
            measure(contestants, rows, args, report)
        report.say(f"{time.perf_counter() - start:.0f} s of writing")


if __name__ == "__main__":
    main()
