"""``tools/node_check.py``: what makes a job of several nodes fail or crawl, found in seconds and named.

Node 0 leads: all meet at its store, it says what is done next and who takes part, gathers the answers within
time limits, judges and prints one line a node.
"""

from megatron_tokedit.cli.node_check.command import build_parser, main

__all__ = ["build_parser", "main"]
