"""Jobs for the tests of gpu_check's runner, and its own jobs on a rank of the pool; imported by name."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time


def count(folder, scale, *, by):
    """A job that tells how often it ran."""
    marks = folder / "marks"
    marks.write_text((marks.read_text() if marks.exists() else "") + "x")
    return {"marks": len(marks.read_text()) * by, "scale": scale.name, "rank": os.environ.get("RANK")}


def look_for_gpu(folder, scale):
    """What a job sees of GPUs, and of a package that is made for them."""
    found = importlib.util.find_spec("transformer_engine") is not None
    try:
        importlib.import_module("transformer_engine")
    except ImportError:
        return {"variable": os.environ.get("CUDA_VISIBLE_DEVICES"), "found": found, "imported": False}
    return {"variable": os.environ.get("CUDA_VISIBLE_DEVICES"), "found": found, "imported": True}


def fail(folder, scale):
    raise ArithmeticError("no such number")


def die(folder, scale):
    os.write(1, b"the last words\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(folder, scale):
    """Hangs, and so does its child."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "grandchild").write_text(str(child.pid))
    time.sleep(600)


def on_rank(name, folder, arguments):
    """One of gpu_check's own jobs, where torch and megatron-core are loaded already."""
    from megatron_tokedit.cli.gpu_check.sizes import CPU

    multiprocessing.current_process()._config["daemon"] = False  # saves fork
    multiprocessing.set_start_method("fork", force=True)
    module, _, function = name.partition(":")
    job = getattr(importlib.import_module(f"megatron_tokedit.cli.gpu_check.{module}"), function)
    return job(folder, CPU, **arguments)


def pack_without_borders(folder):
    """The job of packed rows where nothing says where a conversation begins."""
    from megatron_tokedit.cli.gpu_check import packed_jobs
    from megatron_tokedit.cli.gpu_check.sizes import CPU

    whole = packed_jobs.packed_batch
    packed_jobs.packed_batch = lambda rows, row_length, **_: whole(rows, row_length, has_borders=False)
    try:
        return packed_jobs.pack_rows(folder, CPU, recipe="fp32")
    finally:
        packed_jobs.packed_batch = whole
