"""How conversations become training rows."""

from __future__ import annotations

from typing import Literal

from megatron_tokedit.config.base import Section


class SftConfig(Section):
    """Rows of stage ``sft``."""

    packing: bool = True
    """Several conversations in a row of ``model.seq_length``, none of which sees another; without it each has
    a row of its own, filled up with padding."""
    too_long: Literal["error", "drop"] = "error"
    """A conversation of more than ``model.seq_length`` + 1 tokens (the last one is predicted only) ends the
    run before it starts, or is left out and counted. None is ever cut."""
    without_response: Literal["error", "drop"] = "error"
    """The same for a conversation of which no token counts in the loss."""
