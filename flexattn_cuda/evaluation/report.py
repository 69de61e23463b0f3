"""The page of `flexattn eval`: no script, nothing from elsewhere; its pictures are the files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

from flexattn_cuda.evaluation.published import MAP_TASK
from flexattn_cuda.evaluation.results import TaskResult, cell, tables_of
from flexattn_cuda.runs.files import os_errors_as_input_errors, write_atomically
from flexattn_cuda.tasks.options import EvalOptions


def write_report(options: EvalOptions, results: Sequence[TaskResult]) -> None:
    """Write report.html; InputError if it cannot be written."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["digits"] = _digits
    page = environment.get_template("report.html").render(
        options=options,
        results=results,
        systems=options.system_names,
        tables=tables_of(results),
        cell=lambda system, column: cell(results, system, column),
        map_task=MAP_TASK,
    )
    with os_errors_as_input_errors(options.output):
        write_atomically(options.output / "report.html", page)


def _digits(value: float | None) -> str:
    """Format a number with three significant digits, or all before the point."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
