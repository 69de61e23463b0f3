"""Where the benchmarks' results go: tables on the terminal, CSV files and plots."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_csv(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a column for every key of any row, in the order of their first appearance; None becomes an empty cell."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", width: int = 170
) -> None:
    """Print a table, with rich where it is installed. Columns of numbers are aligned on the right."""
    right = [is_numeric(column) for column in zip(*rows)] or [False] * len(header)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print_plain(title, [header, *rows], right, caption)
        return
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for name, is_right in zip(header, right):
        table.add_column(name, justify="right" if is_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=width, markup=False, highlight=False).print(table)


def is_numeric(column: Sequence[str]) -> bool:
    return all(cell[:1].isdigit() or cell in ("", "-") for cell in column)


def print_plain(title: str, lines: Sequence[Sequence[str]], right: Sequence[bool], caption: str) -> None:
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for line in lines:
        cells = (cell.rjust(n) if is_right else cell.ljust(n) for cell, n, is_right in zip(line, widths, right))
        print("  ".join(cells).rstrip())
    if caption:
        print(caption)


def headless_pyplot():
    """Return matplotlib's pyplot, drawing into files. Raise ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
