"""Attack the package, and print a table of what became of it; exit with 1 if anything is not as it must be.

    python -m python_tests.attack [--seed N] [--minutes N] [--jobs N] [--cases N] [--short] [--out FILE] [KIND ...]

Run it again to resume. FLEXATTN_BACKEND chooses the kernels (python_tests/support/backend.py).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from backend import load_backend

from python_tests.attack.syscalls import preload


def main() -> int:
    preload()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and its workers end with it
    load_backend()
    from python_tests.attack.kinds import KINDS  # not before the program has started again
    from python_tests.attack.runner import Findings, Kind, run

    parser = argparse.ArgumentParser(prog="python -m python_tests.attack")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"by default all: {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after this time; run again to resume")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cases", type=int, default=10**6, help="maximum number of cases of each kind")
    parser.add_argument("--short", action="store_true", help="as few cases as `make test` runs")
    parser.add_argument("--out", type=Path, default=Path("build/attack.jsonl"), help="verdicts, to resume from")
    options = parser.parse_args()
    if unknown := set(options.kinds) - KINDS.keys():
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    findings = Findings(options.out, options.seed)
    chosen = [KINDS[name] for name in options.kinds or KINDS]
    until = time.monotonic() + 60 * options.minutes

    def cases(kind: Kind) -> int:
        return min(options.cases, kind.short if options.short else kind.cases)

    run(chosen, findings, cases, options.jobs, until, progress=True)
    print(findings.table())
    return 1 if findings.bad() else 0


if __name__ == "__main__":
    sys.exit(main())
