"""The page of `flexattn eval`: no script, nothing from elsewhere; its pictures are the files beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from flexattn_cuda.evaluation.judged import missing_key, unscored
from flexattn_cuda.evaluation.published import MAP_TASK
from flexattn_cuda.evaluation.results import TaskResult, cell, comparisons, tables_of
from flexattn_cuda.inputs.frames import Region
from flexattn_cuda.runs.files import os_errors_as_input_errors, write_atomically
from flexattn_cuda.tasks.options import EvalOptions

AREA = Region(64, 12, 628, 264)  # where the curves are in the drawing of map scores


@dataclass(frozen=True)
class Curve:
    """The map scores of a system by layer, as a line of a drawing.

    Attributes:
        system: The system.
        values: By layer.
        points: [layers, 2], x and y in the drawing.
    """

    system: str
    values: dict[int, float]
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """The supplement's figure 2: map scores by layer.

    Attributes:
        curves: One for each system.
        layers: Positions and labels of the axis of layers.
        scores: Positions and labels of the axis of scores.
        width: Of the drawing.
        height: Of the drawing.
        area: Where the curves are.
    """

    curves: list[Curve]
    layers: list[tuple[float, str]]
    scores: list[tuple[float, str]]
    width: int = 640
    height: int = 320
    area: Region = AREA


def figure_of(results: Sequence[TaskResult]) -> Figure | None:
    """Return the figure of the systems that were asked for maps; None if none was."""
    scores = {
        one.system: {int(name.rpartition("_")[2]): metric.value for name, metric in one.metrics.items()}
        for one in results
        if one.task == MAP_TASK and one.metrics
    }
    if not scores:
        return None
    last = max(layer for own in scores.values() for layer in own)
    step = _round_step(max(max(own.values()) for own in scores.values()) / 4)
    top = 4 * step

    def x(layer: int) -> float:
        return AREA.left + (AREA.right - AREA.left) * layer / max(1, last)

    def y(score: float) -> float:
        return AREA.bottom - (AREA.bottom - AREA.top) * score / top

    every = max(1, -(-last // 8))
    return Figure(
        [Curve(system, own, [(x(n), y(own[n])) for n in sorted(own)]) for system, own in scores.items()],
        [(x(layer), str(layer)) for layer in range(0, last + 1, every)],
        [(y(tick * step), f"{tick * step:.3g}") for tick in range(5)],
    )


def _round_step(smallest: float) -> float:
    """Return the first of 1, 2, 2.5, 5 times a power of ten that is not below a number; 1 for what is not positive."""
    if smallest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(smallest))
    return next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= smallest)


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
        comparisons=comparisons(results),
        figure=figure_of(results),
        notes=[unscored(task, key) for task in dict.fromkeys(r.task for r in results) if (key := missing_key(task))],
    )
    with os_errors_as_input_errors(options.output):
        write_atomically(options.output / "report.html", page)


def _digits(value: float | None) -> str:
    """Format a number with three significant digits, or all before the point."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
