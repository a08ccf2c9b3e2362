"""The table of a run's data that is shown before its first step, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_tokedit.dataset.conversations import ConversationCounts
    from megatron_tokedit.dataset.sources import SourceShare

Column = tuple[str, list[str]]


def aligned(columns: Sequence[Column]) -> list[str]:
    """Columns (title, cells) as lines; the first one is aligned left."""
    widths = [max(len(cell) for cell in (title, *cells)) for title, cells in columns]
    rows = [[title for title, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def conversation_table(shares: Sequence[tuple[SourceShare, ConversationCounts]]) -> list[str]:
    """What a fine-tuning run draws from each source; rows are packed as they will be trained on."""
    columns: list[Column] = [
        ("source", [share.name for share, _ in shares]),
        *_sizes([counts for _, counts in shares]),
        ("share", [f"{share.share:.1%}" for share, _ in shares]),
    ]
    if any(share.drawn_before_tokens for share, _ in shares):
        before = [f"{share.drawn_before_tokens // counts.row_length:,}" for share, counts in shares]
        columns.append(("drawn before", before))
    columns.append(
        ("rows drawn", [f"{share.drawn_tokens // counts.row_length:,}" for share, counts in shares])
    )
    columns.append(("epochs", [f"{share.epochs:.2f}" for share, _ in shares]))
    if any(share.max_epochs for share, _ in shares):
        caps = [f"{share.max_epochs:g}" if share.max_epochs else "-" for share, _ in shares]
        columns.append(("at most", caps))
    return aligned(columns) + list(_left_out([(share.name, counts) for share, counts in shares]))


def validation_table(sources: Sequence[tuple[str, ConversationCounts]]) -> list[str]:
    """The held-out conversations."""
    columns = [("validation", [name for name, _ in sources]), *_sizes([counts for _, counts in sources])]
    return aligned(columns) + list(_left_out(sources))


def _sizes(counts: Sequence[ConversationCounts]) -> list[Column]:
    return [
        ("conversations", [f"{count.num_conversations:,}" for count in counts]),
        ("tokens", [f"{count.num_tokens:,}" for count in counts]),
        ("response tokens", [f"{count.num_response_tokens:,}" for count in counts]),
        ("rows", [f"{count.num_rows:,}" for count in counts]),
        ("filled", [f"{count.efficiency:.1%}" for count in counts]),
    ]


def _left_out(sources: Sequence[tuple[str, ConversationCounts]]) -> Iterator[str]:
    for name, counts in sources:
        if counts.num_too_long:
            yield f"{name}: {counts.num_too_long:,} conversations left out, too long (sft.too_long: drop)"
        if counts.num_without_response:
            yield (
                f"{name}: {counts.num_without_response:,} conversations left out, no token counts in the "
                f"loss (sft.without_response: drop)"
            )
