"""Imported once by the fork server of forks.py, ahead of all forks: what commands and ranks need.

What is frozen here no later garbage collection looks at; with these imports, one costs a quarter of a second.
"""

import functools
import gc

import pytest  # noqa: F401
import tensorboard.compat.proto.event_pb2  # noqa: F401
import torch.distributed.checkpoint
import transformers.models.llama.modeling_llama  # noqa: F401

import megatron_tokedit.engine.checkpoint
import megatron_tokedit.engine.model
import megatron_tokedit.engine.step
import megatron_tokedit.scoring.huggingface
import megatron_tokedit.scoring.load
import megatron_tokedit.scoring.megatron
import megatron_tokedit.training.trainer  # noqa: F401

torch.set_num_threads(1)
gc.collect()
CACHES = [thing for thing in gc.get_objects() if type(thing) is functools._lru_cache_wrapper]
gc.freeze()
