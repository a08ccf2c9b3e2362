#!/usr/bin/env python3
"""Convert between Hugging Face folders and Megatron checkpoints. See `tools/convert_checkpoint.py --help`."""

import sys

from megatron_tokedit.cli.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
