#!/usr/bin/env python3
"""Check on a GPU machine what no test without one can. See `tools/gpu_check.py --help`."""

import sys

from megatron_tokedit.cli.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
