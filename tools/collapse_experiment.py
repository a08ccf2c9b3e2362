#!/usr/bin/env python3
"""Model collapse, and what token editing does against it. See `tools/collapse_experiment.py --help`."""

import sys

from megatron_tokedit.cli.collapse_experiment import main

if __name__ == "__main__":
    sys.exit(main())
