"""Jobs with priors of several processes, as the ranks of the pool run them."""

from __future__ import annotations

import contextlib
import io
import os


def preprocess(arguments, port):
    """The command in a process of torchrun's; (exit code, stdout and stderr)."""
    import torch.distributed as dist

    from megatron_tokedit.cli.preprocess_edit import main

    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # or one would leave while another is still meeting
    dist.destroy_process_group()  # the pool's
    launched = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(launched)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return main(arguments), said.getvalue()
    finally:
        for name in launched:
            del os.environ[name]
