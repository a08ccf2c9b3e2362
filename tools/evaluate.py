#!/usr/bin/env python3
"""Evaluate checkpoints: perplexity by domain, and lm-eval's tasks. See `tools/evaluate.py --help`."""

import sys

from megatron_tokedit.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
