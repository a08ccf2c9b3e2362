"""``tools/gpu_check.py``: does everything that needs a GPU work on this machine?

``command`` is the command line, ``plan`` the list of checks, ``runner`` gives every piece of work a process
of its own, and the ``*_jobs`` files hold that work, through the package's own engine, training, scoring and
pipeline. What a check concludes from the numbers of its jobs stands in the ``*_checks`` files.
"""

from megatron_tokedit.cli.gpu_check.command import main

__all__ = ["main"]
