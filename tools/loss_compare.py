#!/usr/bin/env python3
"""Compare the losses of two or more runs step by step. See `tools/loss_compare.py --help`."""

import sys

from megatron_tokedit.cli.loss_compare import main

if __name__ == "__main__":
    sys.exit(main())
