#!/usr/bin/env python3
"""Check the nodes of a job before it starts, one process a node. See `tools/node_check.py --help`."""

import sys

from megatron_tokedit.cli.node_check import main

if __name__ == "__main__":
    sys.exit(main())
