"""The command line ``hf-adaptive-sparse``.

Exit codes: 0 on success; 2 on bad usage or input, with one line on stderr; 1 on a failure of ours,
with its traceback; 130 when interrupted. ``--json`` prints one JSON document on stdout; everything
meant for a person while a job runs goes to stderr.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from hf_adaptive_sparse.cli.arguments import build_parser

INPUT_ERRORS = (ValueError, OSError, TypeError)
"""What a caller can mend. Everything else is a failure of ours and keeps its traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: Command and options; ``None`` takes those of the process.
    """
    options = build_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
    try:
        answer = options.run(options)
    except KeyboardInterrupt:
        print("hf-adaptive-sparse: interrupted.", file=sys.stderr)
        return 130
    except INPUT_ERRORS as error:
        if options.traceback:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"hf-adaptive-sparse {options.command}: {line}", file=sys.stderr)
        return 2
    print(json.dumps(answer.data, indent=2) if options.json else answer.text)
    return 0
