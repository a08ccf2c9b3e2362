"""One job in a process of its own: ``python -m megatron_tokedit.cli.gpu_check.child REQUEST.json``.

A fault on a GPU spoils the whole process that it happens in, so no two jobs share one. Invariant: the answer
appears by rename; a job that left none has died.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from megatron_tokedit import log
from megatron_tokedit.cli.gpu_check.sizes import SCALES

_GPU_PACKAGES = ("transformer_engine", "apex", "amp_C")
"""megatron-core's optimizer takes its kernels from these, where they can be imported, on a CPU too."""


def run(request_file: Path) -> int:
    """Do the job and write its answer beside the request; returns the exit code."""
    request: dict[str, Any] = json.loads(request_file.read_text(encoding="utf-8"))
    log.configure()
    if request["hides_gpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a job that is repeated by hand has not the runner's
        modules: dict[str, Any] = sys.modules
        modules.update(dict.fromkeys(_GPU_PACKAGES))  # None: not installed
    try:
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        scale = SCALES[request["scale"]]
        answer = {"numbers": function(Path(request["folder"]), scale, **request["arguments"])}
    except Exception:  # noqa: BLE001 - whatever goes wrong in a job is its result
        answer = {"traceback": traceback.format_exc()}
    partial = Path(request["answer"] + ".partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.replace(request["answer"])
    return 0 if "numbers" in answer else 1


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
