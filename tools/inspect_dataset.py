#!/usr/bin/env python3
"""Look into datasets: show, verify, diff, undo, merge. See `tools/inspect_dataset.py --help`."""

import sys

from megatron_tokedit.cli.inspect_dataset import main

if __name__ == "__main__":
    sys.exit(main())
