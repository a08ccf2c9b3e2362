"""Raw corpora to edited indexed datasets; see --help."""

import sys

from megatron_tokedit.cli.preprocess_edit import main

if __name__ == "__main__":
    sys.exit(main())
