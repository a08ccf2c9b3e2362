"""Conversations in packed rows, as fine-tuning trains on them, beside the same conversations one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tokedit.cli.gpu_check.sizes import Scale
from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig

if TYPE_CHECKING:
    import torch

_SHARES = (((3, 8, 5), (1, 4, -3), (0, 1, 1), (1, 8, 3)), ((5, 8, -1), (1, 4, 3)))
"""Lengths of the conversations of two rows: (a, b, c) is a / b of the row and c more. Padding fills it up."""


def pack_rows(folder: Path, scale: Scale, *, recipe: str) -> dict[str, Any]:
    """Losses and gradients of packed rows, of their conversations alone, and of rows whose ids are changed.

    Args:
        folder: the work folder.
        scale: sizes.
        recipe: precision recipe.

    Returns:
        ``tokens`` compared; ``mean`` and ``worst`` difference of a token's loss from that of the conversation
        alone; ``gradient``: difference of the gradients, as a share of their norm; ``neighbours``: the most
        that a token's loss changed when another conversation of the microbatch did; ``own``: the most that a
        loss of the changed one did, where it has several tokens, of the conversation with the least;
        ``without_borders``: the most that others' losses change where the row has no borders. All in nats.
    """
    import torch

    torch.manual_seed(11)
    bench = _Bench(scale, recipe)
    rows = [
        [torch.randint(0, scale.vocab_size, (length + 1,)) for length in lengths]
        for lengths in row_lengths(bench.row_length)
    ]
    places = [(row, index) for row, ids_of_row in enumerate(rows) for index in range(len(ids_of_row))]
    bench.chunk.zero_grad_buffer()
    packed = bench.packed(rows)
    torch.cat(packed).sum().backward()
    packed_gradient = bench.gradient()
    alone = [bench.alone(rows[row][index]) for row, index in places]
    torch.cat(alone).sum().backward()
    alone_gradient = bench.gradient()
    differences = (torch.cat(packed) - torch.cat(alone)).detach().abs()
    with torch.no_grad():
        neighbours, own = zip(*(bench.change(rows, place, packed) for place in places), strict=True)
        long = [change for change, losses in zip(own, packed, strict=True) if len(losses) > 1]
        unbounded = bench.packed(rows, has_borders=False)
        without, _ = bench.change(rows, places[0], unbounded, has_borders=False)
    return {
        "tokens": len(differences),
        "mean": differences.mean().item(),
        "worst": differences.max().item(),
        "gradient": ((packed_gradient - alone_gradient).norm() / alone_gradient.norm()).item(),
        "neighbours": max(neighbours),
        "own": min(long),
        "without_borders": without,
        "device": bench.ctx.device.type,
    }


def row_lengths(row_length: int) -> list[list[int]]:
    """Positions that the conversations of each row take, from one position to more than half of the row."""
    return [[row_length * a // b + c for a, b, c in shares] for shares in _SHARES]


class _Bench:
    """A model, and the losses of conversations through it."""

    def __init__(self, scale: Scale, recipe: str) -> None:
        from megatron_tokedit.engine.initialize import initialize
        from megatron_tokedit.engine.model import build_model

        parallel = ParallelConfig()
        fields = {**scale.model, "init_method_std": scale.model["hidden_size"] ** -0.5}
        self.row_length, self.vocab_size = int(fields["seq_length"]), scale.vocab_size
        self.ctx = initialize(parallel, seed=3, standalone=True)
        (self.chunk,) = build_model(
            ModelConfig.model_validate(fields),
            PrecisionConfig.model_validate({"recipe": recipe}),
            self.ctx,
            scale.vocab_size,
            parallel=parallel,
            wrap_with_ddp=True,
        )
        self.chunk.train()

    def packed(
        self, rows: Sequence[Sequence[torch.Tensor]], *, has_borders: bool = True
    ) -> list[torch.Tensor]:
        """The losses of every conversation of a microbatch, as a training step computes them."""
        from megatron_tokedit.engine.packing import flat_rows

        batch = packed_batch(rows, self.row_length, has_borders=has_borders)
        flat, borders = flat_rows(batch, self.ctx.device)
        moved = {key: value.to(self.ctx.device) for key, value in flat.items()}
        losses = self.chunk(
            moved["tokens"], moved["position_ids"], None, labels=moved["labels"], packed_seq_params=borders
        )[0].float()
        return [losses[start:stop] for start, stop in _places(rows, self.row_length)]

    def alone(self, ids: torch.Tensor) -> torch.Tensor:
        """The losses of a conversation through plain causal attention."""
        import torch

        ids = ids.to(self.ctx.device)
        positions = torch.arange(len(ids) - 1, device=ids.device)[None]
        losses: torch.Tensor = self.chunk(ids[None, :-1], positions, None, labels=ids[None, 1:])[0].float()
        return losses

    def gradient(self) -> torch.Tensor:
        """What the backward passes since the last call came to."""
        import torch

        found = torch.cat([each.main_grad.flatten().double() for each in self.chunk.parameters()])
        self.chunk.zero_grad_buffer()
        return found

    def change(
        self,
        rows: Sequence[Sequence[torch.Tensor]],
        place: tuple[int, int],
        before: Sequence[torch.Tensor],
        *,
        has_borders: bool = True,
    ) -> tuple[float, float]:
        """The most that the losses of others, and of the conversation at a place, change with its ids."""
        changed = [list(ids_of_row) for ids_of_row in rows]
        row, index = place
        changed[row][index] = (changed[row][index] + 1) % self.vocab_size
        number = sum(map(len, rows[:row])) + index
        after = self.packed(changed, has_borders=has_borders)
        differences = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
        own = differences.pop(number)
        return max(differences), own


def packed_batch(
    rows: Sequence[Sequence[torch.Tensor]], row_length: int, *, has_borders: bool
) -> dict[str, torch.Tensor]:
    """A microbatch of conversations; without borders every row counts its positions as one conversation."""
    import torch

    shape = (len(rows), row_length)
    batch = {key: torch.zeros(shape, dtype=torch.int64) for key in ("tokens", "labels")}
    batch["position_ids"] = torch.arange(row_length).repeat(len(rows), 1)
    stop = 0
    flat = {key: value.view(-1) for key, value in batch.items()}
    for ids, (start, stop) in zip(_conversations(rows), _places(rows, row_length), strict=True):
        flat["tokens"][start:stop], flat["labels"][start:stop] = ids[:-1], ids[1:]
        if has_borders:
            rest = row_length - stop % row_length if stop % row_length else 0
            flat["position_ids"][start:stop] = torch.arange(stop - start)
            flat["position_ids"][stop : stop + rest] = torch.arange(rest)
    return batch


def _conversations(rows: Sequence[Sequence[torch.Tensor]]) -> Iterator[torch.Tensor]:
    for ids_of_row in rows:
        yield from ids_of_row


def _places(rows: Sequence[Sequence[torch.Tensor]], row_length: int) -> Iterator[tuple[int, int]]:
    """Where each conversation is when the rows are behind one another."""
    for row, ids_of_row in enumerate(rows):
        start = row * row_length
        for ids in ids_of_row:
            yield start, start + len(ids) - 1
            start += len(ids) - 1
