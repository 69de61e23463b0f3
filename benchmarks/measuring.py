"""What the benchmarks share: the machine's name, medians of calls that take turns, tables and CSV."""

from __future__ import annotations

import csv
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def machine(device: str) -> dict[str, str]:
    """Columns that say where a row was measured."""
    import torch  # here, so that tables do without

    if device == "cpu":
        return {
            "device": torch.backends.cpu.get_cpu_capability(),
            "driver": "",
            "torch": torch.__version__,
            "cuda": "",
        }
    return {
        "device": torch.cuda.get_device_name(), "driver": driver_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)
    }  # fmt: skip


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def medians(
    functions: dict[str, Callable], seconds: float, least: int = 5, time_of: Callable | None = None
) -> dict[str, tuple[float, int]]:
    """Median seconds of each and the number of runs; they take turns, so that a slow moment hits all alike.

    time_of: Calls a function and gives the seconds that it took; by default on this processor's clock.
    """
    time_of = time_of or wall_clock
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or min(map(len, times.values())) < least:
        for name, function in functions.items():
            times[name].append(time_of(function))
    return {name: (statistics.median(found), len(found)) for name, found in times.items()}


def wall_clock(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def write_csv(path: str | Path, rows: Iterable[dict]) -> None:
    """A column for every key of any row, in the order of their first appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], width: int = 170) -> None:
    """With rich where it is installed. Columns of figures are aligned on the right."""
    figures = [all(cell[:1].isdigit() or cell in ("", "-") for cell in column) for column in zip(*rows)] or [
        False
    ] * len(header)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        print(f"\n{title}")
        for row in (header, *rows):
            print(
                "  ".join(
                    cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, figures)
                ).rstrip()
            )
        return
    table = Table(title=title, title_justify="left")
    for name, right in zip(header, figures):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=width, markup=False, highlight=False).print(table)
