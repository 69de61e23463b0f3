"""The error of a report that cannot be made."""

from __future__ import annotations

import sys
from pathlib import Path


class UnmeasuredError(SystemExit):
    """End the program with one sentence on stderr and exit code 2."""

    def __init__(self, sentence: str):
        print(f"{Path(sys.argv[0]).stem}: {sentence}", file=sys.stderr)
        super().__init__(2)
