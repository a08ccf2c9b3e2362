"""Our training step against a bare megatron-core loop and a Hugging Face Llama of the same shape, in one run.

    python benchmarks/train_step.py                 # bf16; 4 x 192 Llama, vocabulary 2048, sequence 512
    python benchmarks/train_step.py --recipe fp32
    torchrun --nproc-per-node 2 benchmarks/train_step.py --tp 2      # ours against bare, tensor-parallel
    python benchmarks/train_step.py --only ours                      # one alone: its peak memory

The contestants take turns step by step, so that whatever else the machine does hits all of them; the table
shows medians and the best step. "Bare" is megatron-core as it comes (its local layer spec with
DotProductAttention, its cross entropy, torch's default AdamW, optimizer.step()) behind our CPU redirection.
Hugging Face runs float32 weights under bf16 autocast (or plain float32) with SDPA attention and fused AdamW.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402

from megatron_tokedit.config.sections import (  # noqa: E402
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
)
from megatron_tokedit.engine import cpu_device  # noqa: E402
from megatron_tokedit.engine import model as engine_model  # noqa: E402
from megatron_tokedit.engine.initialize import ParallelContext, initialize  # noqa: E402
from megatron_tokedit.engine.optimizer import build_optimizer, build_scheduler  # noqa: E402
from megatron_tokedit.engine.step import train_step  # noqa: E402
from megatron_tokedit.scoring.resident import peak_resident_bytes  # noqa: E402
from megatron_tokedit.testing.models import random_batches  # noqa: E402
from megatron_tokedit.training.throughput import peak_tflops  # noqa: E402

Step = Callable[[], float]


def _batches(args: argparse.Namespace, ctx: ParallelContext) -> Iterator[Any]:
    num = args.microbatches * ctx.dp_size
    source = random_batches(
        args.vocab_size,
        num_microbatches=num,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        dp_rank=ctx.dp_rank,
        dp_size=ctx.dp_size,
    )
    return itertools.cycle(list(itertools.islice(source, args.microbatches)))


def ours(
    args: argparse.Namespace, model: ModelConfig, parallel: ParallelConfig, ctx: ParallelContext
) -> Step:
    """The package's own step."""
    precision, optimizer_config = PrecisionConfig(recipe=args.recipe), OptimizerConfig(lr=1e-3)
    chunks = engine_model.build_model(
        model, precision, ctx, args.vocab_size, parallel=parallel, wrap_with_ddp=True
    )
    optimizer = build_optimizer(optimizer_config, precision, parallel, chunks, ctx)
    scheduler = build_scheduler(optimizer_config, ScheduleConfig(), optimizer, train_steps=10_000)
    batches = _batches(args, ctx)
    shapes = {
        "num_microbatches": args.microbatches,
        "micro_batch_size": args.micro_batch_size,
        "seq_length": args.seq_length,
    }
    return lambda: train_step(chunks, optimizer, scheduler, batches, ctx, **shapes).loss


def bare(
    args: argparse.Namespace, model: ModelConfig, parallel: ParallelConfig, ctx: ParallelContext
) -> Step:
    """megatron-core's own example loop: GPTModel with the stock local spec, DDP, get_megatron_optimizer."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    precision = PrecisionConfig(recipe=args.recipe)
    config = engine_model.transformer_config(model, precision, parallel, ctx.device)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=engine_model.padded_vocab_size(args.vocab_size, 128, ctx.tp_size),
        max_sequence_length=args.seq_length,
        pre_process=ctx.is_first_stage,
        post_process=ctx.is_last_stage,
        position_embedding_type="rope",
    )
    gpt = Float16Module(config, gpt) if config.bf16 else gpt
    (module,) = engine_model._wrap_with_ddp([gpt], config, precision, parallel, ctx)
    fields = {"bf16": config.bf16, "params_dtype": config.params_dtype}
    with cpu_device.cuda_type_names():
        optimizer = get_megatron_optimizer(
            CoreOptimizerConfig(lr=1e-3, weight_decay=0.1, use_distributed_optimizer=True, **fields),
            [module],
            use_gloo_process_groups=False,
        )
    batches = _batches(args, ctx)
    causal = (torch.ones(args.seq_length, args.seq_length).tril() < 0.5)[None, None]

    def forward(source: Iterator[Any], chunk: Any) -> Any:
        batch = next(source)
        output = chunk(batch["tokens"], batch["position_ids"], causal, labels=batch["labels"])

        def loss_func(loss: torch.Tensor) -> Any:
            total = (loss.float() * batch["loss_mask"]).sum()
            count = batch["loss_mask"].sum().int()
            return total, count, total.detach() / count

        return output, loss_func

    def step() -> float:
        module.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=batches,
            model=[module],
            num_microbatches=args.microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
        with cpu_device.cuda_type_names():
            optimizer.step()
        return float(sum(losses)) / len(losses) if losses else 0.0

    return step


def hugging_face(args: argparse.Namespace, model: ModelConfig, ctx: ParallelContext) -> Step:
    """A Hugging Face Llama of the same shape in a plain torch loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=args.seq_length,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    network = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    batches = _batches(args, ctx)

    def step() -> float:
        total = 0.0
        optimizer.zero_grad()
        for _ in range(args.microbatches):
            batch = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.recipe == "bf16"):
                logits = network(batch["tokens"]).logits
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none"
            )
            mask = batch["loss_mask"].flatten()
            loss = (nll * mask).sum() / mask.sum() / args.microbatches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def measure(contestants: dict[str, Step], num_steps: int) -> dict[str, list[float]]:
    """Seconds of every step, the contestants taking turns; two steps of each come first, unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(num_steps + 2):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            if index >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", choices=["ours", "bare", "hf"], help="memory of one contestant alone")
    return parser.parse_args()


def main() -> None:
    """Run the contestants and print the table on rank 0."""
    args = parse()
    parallel = ParallelConfig(tensor_model_parallel_size=args.tp, pipeline_model_parallel_size=args.pp)
    ctx = initialize(parallel, seed=1, cpu_threads=args.threads)
    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.heads,
        seq_length=args.seq_length,
    )
    makers: dict[str, tuple[str, Callable[[], Step]]] = {
        "ours": ("ours", lambda: ours(args, model, parallel, ctx)),
        "bare": ("bare megatron-core", lambda: bare(args, model, parallel, ctx)),
    }
    if ctx.world_size == 1:
        makers["hf"] = ("Hugging Face", lambda: hugging_face(args, model, ctx))
    chosen = [args.only] if args.only else list(makers)
    before = peak_resident_bytes()
    contestants = {makers[key][0]: makers[key][1]() for key in chosen}
    seconds = measure(contestants, args.steps)
    limit = (peak_tflops(ctx.device, args.recipe, None) or float("nan")) * ctx.world_size * 1e3
    if ctx.rank == 0:
        tokens = args.microbatches * args.micro_batch_size * args.seq_length * ctx.dp_size
        flops = engine_model.flops_per_token(model, args.vocab_size)
        print(
            f"{args.recipe}, {args.layers} x {args.hidden_size}, "
            f"{engine_model.num_parameters(model, args.vocab_size) / 1e6:.2f} M parameters, "
            f"sequence {args.seq_length}, {args.microbatches} x {args.micro_batch_size} rows, "
            f"{ctx.world_size} rank(s) x {torch.get_num_threads()} thread(s)"
        )
        base = statistics.median(seconds.get("ours") or next(iter(seconds.values())))
        print(f"{'':20}{'tokens/s':>10}{'best':>10}{'GFLOP/s':>10}{'ours / it':>12}")
        for name, values in seconds.items():
            median = statistics.median(values)
            print(
                f"{name:20}{tokens / median:10.0f}{tokens / min(values):10.0f}"
                f"{tokens / median * flops / 1e9:10.1f}{median / base:11.2f}x"
            )
        share = tokens / base * flops / 1e9 / limit
        if args.only:
            grown = (peak_resident_bytes() - before) / 1e6
            print(f"peak resident memory of rank 0: {before / 1e6:.0f} MB before, {grown:.0f} MB more after")
        print(
            f"limit: {limit:.0f} GFLOP/s in matrix products on all ranks, measured now; reached: {share:.0%}"
        )
    ctx.destroy()


if __name__ == "__main__":
    main()
