#!/usr/bin/env python3
"""Say what this machine has and which kernel each part will use. See `tools/doctor.py --help`."""

import sys

from megatron_tokedit.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
