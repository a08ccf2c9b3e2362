"""Writes megatron-core's ``torch_dist`` checkpoint format from the training process itself.

megatron-core's own strategy starts a manager process (spawn) and forks two writers a rank at every save,
which costs seconds and forces an ``if __name__ == "__main__"`` guard on every program. torch's file writer
makes the same files with threads. Invariant: what is written here is what megatron-core's loading expects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as torch_save


class InProcessSave(SaveShardedStrategy):
    """A synchronous save of one file a rank."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Write this rank's shards; rank 0 also writes the metadata. Collective over the world."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=1, overwrite=False),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Sharded objects go into the same files."""
        return True
