"""Packed rows: the losses of each sequence are those of the sequence alone, whatever its neighbours are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.testing.models import tiny_model
from megatron_tokedit.testing.ranks import RankPool

VOCAB_SIZE = 90
LENGTHS = (13, 7, 1, 9)  # and two positions of padding
ROW = 32


def sequences(seed: int = 0) -> list[torch.Tensor]:
    """Sequences of one token more than they take positions."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB_SIZE, (length + 1,), generator=generator) for length in LENGTHS]


def packed_batch(rows: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A microbatch of rows of sequences."""
    shape = (len(rows), ROW)
    batch = {key: torch.zeros(shape, dtype=torch.int64) for key in ("tokens", "labels", "position_ids")}
    batch["loss_mask"] = torch.zeros(shape)
    for row, ids_of_row in enumerate(rows):
        start = 0
        for ids in ids_of_row:
            end = start + len(ids) - 1
            batch["tokens"][row, start:end], batch["labels"][row, start:end] = ids[:-1], ids[1:]
            batch["position_ids"][row, start:end] = torch.arange(end - start)
            batch["loss_mask"][row, start:end] = 1.0
            start = end
        batch["position_ids"][row, start:] = torch.arange(ROW - start)
    return batch


def build(model: ModelConfig, precision: str = "fp32") -> Any:
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model

    parallel = ParallelConfig()
    ctx = initialize(parallel, seed=7, device="cpu", cpu_threads=1)
    recipe = PrecisionConfig(recipe=precision)
    (module,) = build_model(model, recipe, ctx, VOCAB_SIZE, parallel=parallel, wrap_with_ddp=False)
    return module


def token_losses(module: Any, rows: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The losses of every sequence's tokens, through packed rows."""
    from megatron_tokedit.engine.packing import flat_rows

    batch, packed = flat_rows(packed_batch(rows), torch.device("cpu"))
    losses = module(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed
    )[0]
    found, start = [], 0
    for row, ids_of_row in enumerate(rows):
        start = row * ROW
        for ids in ids_of_row:
            found.append(losses[start : start + len(ids) - 1])
            start += len(ids) - 1
    return found


def alone(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """The same through plain causal attention: the sequence and nothing else."""
    positions = torch.arange(len(ids) - 1)[None]
    return module(ids[None, :-1], positions, None, labels=ids[None, 1:])[0]


def gradients(module: Any) -> torch.Tensor:
    found = torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None])
    module.zero_grad()
    return found


def compare(family: str) -> dict[str, Any]:
    """Losses and gradients of packed rows beside those of the sequences one by one."""
    changes = {"moe_aux_loss_coeff": 0.0} if family == "mixtral" else {}
    module = build(tiny_model(family, **changes))
    one, two = sequences(0), sequences(1)
    together = [*token_losses(module, [one, two])]
    sum(loss.sum() for loss in together).backward()
    packed_gradient = gradients(module)
    singly = [alone(module, ids) for ids in (*one, *two)]
    sum(loss.sum() for loss in singly).backward()
    apart_gradient = gradients(module)
    return {
        "worst_loss": max(float((a - b).abs().max()) for a, b in zip(together, singly, strict=True)),
        "sums": [float(sum(loss.double().sum() for loss in losses)) for losses in (together, singly)],
        "gradient": float((packed_gradient - apart_gradient).norm() / apart_gradient.norm()),
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "olmo", "mixtral"])
def test_packed_losses_and_gradients_are_those_of_the_sequences_alone(ranks: RankPool, family: str) -> None:
    (found,) = ranks.run(compare, family, world_size=1)
    assert found["worst_loss"] < 2e-6, "float32 rounding of one token's loss"
    assert found["sums"][0] == pytest.approx(found["sums"][1], rel=1e-7)
    assert found["gradient"] < 1e-6


def neighbours_changed() -> list[bool]:
    """For every sequence of a row: whether its losses kept their bits when another one's ids changed."""
    module = build(tiny_model("llama"))
    with torch.no_grad():
        before = token_losses(module, [sequences(0), sequences(1)])
        kept = []
        for changed in range(len(LENGTHS)):
            row = sequences(0)
            row[changed] = (row[changed] + 1) % VOCAB_SIZE
            after = token_losses(module, [row, sequences(2)])
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            kept.append(all(s for i, s in enumerate(same[: len(LENGTHS)]) if i != changed))
            kept.append(not same[changed])
        return kept


def test_no_sequence_sees_another(ranks: RankPool) -> None:
    (kept,) = ranks.run(neighbours_changed, world_size=1)
    assert all(kept)


def gradient_leaks() -> list[float]:
    """The largest gradient of one sequence's losses in the embeddings of the ids that are in others only."""
    module = build(tiny_model("llama"))
    rows = [torch.arange(10 * i, 10 * i + length + 1) % VOCAB_SIZE for i, length in enumerate((9, 8, 7))]
    losses = token_losses(module, [rows])
    losses[1].sum().backward()
    table = module.embedding.word_embeddings.weight.grad.abs().amax(dim=1)
    return [float(table[ids].max()) for ids in (rows[0][:-1], rows[1][:-1], rows[2][:-1])]


def test_no_gradient_reaches_another_sequence(ranks: RankPool) -> None:
    (found,) = ranks.run(gradient_leaks, world_size=1)
    assert found[0] == found[2] == 0.0
    assert found[1] > 0.0


def against_a_mask(family: str) -> tuple[float, float]:
    """Packed rows beside megatron-core's own way: one [s, s] mask, and positions from the batch."""
    module = build(tiny_model(family, attention_dropout=0.0))
    row = sequences(3)
    batch = packed_batch([row])
    owner = torch.repeat_interleave(
        torch.arange(len(LENGTHS) + 1), torch.tensor([*LENGTHS, ROW - sum(LENGTHS)])
    )
    hidden = (owner[:, None] != owner[None, :]) | torch.ones(ROW, ROW, dtype=torch.bool).triu(1)
    with torch.no_grad():
        masked = module(batch["tokens"], batch["position_ids"], hidden[None, None], labels=batch["labels"])[0]
        packed = torch.cat(token_losses(module, [row]))
    return float((masked[: len(packed)] - packed).abs().max()), float(packed.mean())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_as_a_block_diagonal_mask(ranks: RankPool, family: str) -> None:
    """For rotary positions up to rounding: a mask leaves them counting on, and only differences matter."""
    ((difference, mean),) = ranks.run(against_a_mask, family, world_size=1)
    assert difference < 5e-6
    assert mean > 1.0


def parameters_of(position_ids: list[list[int]]) -> tuple[Any, ...]:
    from megatron_tokedit.engine.packing import flat_rows

    batch = {"position_ids": torch.tensor(position_ids), "tokens": torch.tensor(position_ids)}
    flat, packed = flat_rows(batch, torch.device("cpu"))
    return tuple(flat["tokens"].shape), packed.cu_seqlens_q.tolist(), packed.max_seqlen_q, packed.lengths


def test_borders_come_from_positions(ranks: RankPool) -> None:
    (found,) = ranks.run(parameters_of, [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]], world_size=1)
    assert found == ((1, 10), [0, 3, 5, 6, 10], 4, (3, 2, 1, 4))
