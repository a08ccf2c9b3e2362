"""How megatron-core's ``torch_dist`` checkpoints are written and read: here or in the background, each rank
its own or the data-parallel ranks sharing the work.

A save that is waited for is written by the training process itself: megatron-core's own strategy starts a
manager process (spawn) and forks two writers a rank at every save, which costs seconds and forces an
``if __name__ == "__main__"`` guard on every program. torch's file writer makes the same files with threads,
two a rank as megatron-core's.
Invariant: what is written here is what megatron-core's loading expects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

_FILES_A_RANK = 2


class InProcessSave(SaveShardedStrategy):
    """A synchronous save of two files a rank, each written by a thread."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Write this rank's shards; rank 0 also writes the metadata. Collective over the world."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=_FILES_A_RANK, overwrite=False),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Sharded objects go into the same files."""
        return True


def save_strategy(*, in_background: bool, fully_parallel: bool) -> Any:
    """The strategy of a save; one that shares the work is for more than one data-parallel rank."""
    strategy = (
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1) if in_background else InProcessSave()
    )
    return FullyParallelSaveStrategyWrapper(strategy, _sharers()) if fully_parallel else strategy


def load_strategy(folder: Path) -> Any:
    """The strategy of a load whose work the data-parallel ranks share."""
    return FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), _sharers())


def _sharers() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
