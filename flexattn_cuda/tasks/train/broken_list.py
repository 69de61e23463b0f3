"""broken.jsonl: the records that were left out, and why."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import os_errors_as_input_errors
from flexattn_cuda.tasks.training_data import Broken


@dataclass(frozen=True)
class BrokenList:
    """The list of broken records in a file, one JSON object per line."""

    path: Path

    def write(self, found: Sequence[Broken]) -> None:
        """Start the list with what the check has found."""
        with os_errors_as_input_errors(self.path):
            self.path.write_text("".join(map(_line, found)))

    def report_later(self, broken: Broken) -> None:
        """Add a record that broke after the check, in whichever process finds it, and say so."""
        print(f"{broken}; another record takes its place", file=sys.stderr, flush=True)
        with os_errors_as_input_errors(self.path), open(self.path, "a") as file:
            file.write(_line(broken))

    def require_usable(self, found: Sequence[Broken], records: int, on_broken: str) -> None:
        """Raise InputError if the data cannot be trained on.

        Args:
            found: The broken records.
            records: Number of all records.
            on_broken: "refuse" accepts no broken record; "skip" needs one that is not.
        """
        if found and on_broken == "refuse":
            raise InputError(
                f"{len(found)} of {records} records are broken, the first is {found[0]}; see {self.path} for all, "
                "or skip them with `--broken skip`"
            )
        if len(found) == records:
            raise InputError(f"all {records} records are broken; {self.path} says why")


def print_summary(found: Sequence[Broken], records: int) -> None:
    """Count the broken records by kind, on stderr."""
    print(f"{records} records, {len(found)} of them broken", file=sys.stderr)
    for kind, count in Counter(one.kind for one in found).most_common():
        print(f"  {count} {kind}", file=sys.stderr)


def _line(broken: Broken) -> str:
    return json.dumps(asdict(broken)) + "\n"
