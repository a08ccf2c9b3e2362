#!/usr/bin/env python3
"""Continue prompts with a checkpoint. See `tools/generate.py --help`."""

import sys

from megatron_tokedit.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
