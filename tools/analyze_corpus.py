#!/usr/bin/env python3
"""Diagnose corpora: JSON, pictures and a report. See `tools/analyze_corpus.py --help`."""

import sys

from megatron_tokedit.cli.analyze_corpus import main

if __name__ == "__main__":
    sys.exit(main())
