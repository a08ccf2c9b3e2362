#!/usr/bin/env python3
"""Submit a run's chain of Slurm jobs. See `tools/submit.py --help`."""

import sys

from megatron_tokedit.cli.submit import main

if __name__ == "__main__":
    sys.exit(main())
