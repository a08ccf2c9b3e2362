#!/usr/bin/env python3
"""Say at a Slurm job's start and end where its run is. See `tools/slurm_job.py --help`."""

import sys

from megatron_tokedit.cli.slurm_job import main

if __name__ == "__main__":
    sys.exit(main())
