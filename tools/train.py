#!/usr/bin/env python3
"""Check, prepare and train as a YAML file says. See `tools/train.py --help`."""

import sys

from megatron_tokedit.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
