"""How the pipeline stages of a model that only scores pass hidden states on.

Invariant: in every pass a stage receives once and sends once, also one that could not compute what it sends
(``unfinished_pass``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Stages:
    """A forward pass over pipeline stages, each of which sends its output on, by megatron-core's messages.

    Nobody waits for a stage behind: while one works on a batch, the one before it works on the next.
    """

    def __init__(self, gpt: Any) -> None:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        self._gpt, self._config = gpt, gpt.config
        self._is_first = parallel_state.is_pipeline_first_stage()
        self._is_last = parallel_state.is_pipeline_last_stage()
        self._config.batch_p2p_sync = False  # or the host would wait for the GPU at every message
        self._messages = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), gpt.config)
        self._is_received = self._is_sent = False

    def begin(self) -> None:
        """A pass begins."""
        self._is_received = self._is_sent = False

    def forward(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        """This stage's output ``[T / ranks that a sequence is cut among, B, hidden]``."""
        config = self._config
        pieces = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.begin()
        received = self.receive((ids_BT.size(1) // pieces, ids_BT.size(0), config.hidden_size))
        if not self._is_first:
            self._gpt.set_input_tensor(received)
        hidden: torch.Tensor = self._gpt(ids_BT, positions_BT, None)
        self.send(hidden)
        return hidden

    def receive(self, shape: Sequence[int]) -> Any:
        """What the stage before sends in this pass, once; None on the first stage."""
        if self._is_first or self._is_received:
            return None
        received = self._messages.recv_forward(tuple(shape), is_first_stage=False)
        self._is_received = True
        return received

    def send(self, hidden: torch.Tensor) -> None:
        """Send to the stage behind in this pass, once."""
        if not self._is_sent:
            self._messages.send_forward(hidden, is_last_stage=self._is_last)
            self._is_sent = True
