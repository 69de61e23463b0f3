"""Time of `flexattn --version` and of an input error (a missing image), relative to an empty typer application.

    python benchmarks/bench_cli.py
    python benchmarks/bench_cli.py --runs 40 --csv cli.csv

The empty application has two commands without options and ends in a usage error, so it costs what any command line on
typer costs: Python, typer, and rich for the message. The three commands take turns, each in a process of its own, and
medians of the wall-clock time are compared. The exit code is 1 if a ratio exceeds 2.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial

import measuring
import tables

MAX_RATIO = 2.0
BASELINE = "an empty typer application"
EMPTY_APP = """
import typer

app = typer.Typer()

@app.command()
def one() -> None:
    pass

@app.command()
def two() -> None:
    pass

app(["three"])
"""
FLEXATTN = "from flexattn_cuda.cli import main; main()"  # what the installed script runs


def commands() -> dict[str, list[str]]:
    """Return the commands by name."""
    return {
        BASELINE: [sys.executable, "-c", EMPTY_APP],
        "flexattn --version": [sys.executable, "-c", FLEXATTN, "--version"],
        'flexattn ask missing.jpg "?"': [sys.executable, "-c", FLEXATTN, "ask", "missing.jpg", "?"],
    }


def run(command: list[str], exit_code: int) -> None:
    """Run a command; raise RuntimeError if it ends otherwise than expected, for then it is not what is measured."""
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != exit_code:
        raise RuntimeError(f"{command} ended with exit code {ended.returncode}, not {exit_code}: {ended.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the start of the command line with an empty one's.")
    parser.add_argument("--runs", type=int, default=20, help="Minimum number of runs of each command.")
    parser.add_argument("--csv", help="Write a CSV file with command, milliseconds, runs and ratio.")
    arguments = parser.parse_args()
    functions = {
        name: partial(run, command, 0 if name.endswith("--version") else 2) for name, command in commands().items()
    }
    medians = measuring.medians(functions, 0, arguments.runs)
    baseline = medians[BASELINE][0]
    rows = [
        {"command": name, "ms": f"{1000 * seconds:.0f}", "runs": str(runs), "ratio": f"{seconds / baseline:.2f}"}
        for name, (seconds, runs) in medians.items()
    ]
    tables.print_table("start of a command line", list(rows[0]), [list(row.values()) for row in rows])
    if arguments.csv:
        tables.write_csv(arguments.csv, rows)
    return int(any(seconds / baseline > MAX_RATIO for seconds, _ in medians.values()))


if __name__ == "__main__":
    sys.exit(main())
