"""``python -m hf_adaptive_sparse`` is the command line."""

import sys

from hf_adaptive_sparse.cli import main

sys.exit(main())
