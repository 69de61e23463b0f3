"""Tables, figures and the page of the study, made of what its runner left in a folder (results.py) and nothing else.

Files written:
    table_1_2.csv    system, title, objects ("small" or "all"), task (or "all"), accuracy (mean over seeds), deviation
                     (over seeds), wilson_low, wilson_high (95 %, over all questions), questions, seeds, and the columns
                     of costs.csv
    table_4.csv      the same without costs for all sizes of objects, over all tasks
    differences.csv  system, minus, objects, task, difference (mean, paired by question), error_questions, error_seeds
                     (its standard errors), same_sign (in all seeds), over_two_standard_errors (of the larger one),
                     questions, expected ("above": positive, with both of these; "level": not below zero by more than
                     two), holds, seed_N
    figure_4_left.png, figure_4_right.png, supplement_figure_2.png, report.html
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studies.small import figures
from studies.small.page import make_page
from studies.small.results import ALL, MAPPED, Cost, Results, grouped, mean, title, write_csv
from studies.small.statistics import Accuracy, Verdict, accuracy, paired_difference
from studies.small.tables import AccuracyRow

STRATEGIES = {"flexattn": "attention map", "random": "random", "center": "center"}
ZOOMS = {1: "llava", 2: "flexattn-zoom2", 3: "flexattn", 4: "flexattn-zoom4"}


@dataclass(frozen=True)
class Expectation:
    """What the paper leads one to expect of FlexAttention: against which system, on which objects, and what."""

    other: str
    objects: str
    expected: str


EXPECTATIONS = (
    Expectation("llava", "small", "above"),
    Expectation("random", "small", "above"),
    Expectation("center", "small", "above"),
    Expectation("hd", ALL, "level"),
)


def write_report(folder: Path) -> Path:
    """Write tables, figures and the page into the results folder.

    Args:
        folder: With the files that results.py lists.

    Returns:
        The path of report.html.

    Raises:
        InputError: If there are no answers, a file cannot be read, or matplotlib is not installed.
    """
    figures.require_matplotlib()
    folder = Path(folder)
    results = Results.read(folder)
    verdicts = judge(results)
    by_task, by_size = accuracy_by_task(results), accuracy_by_size(results)
    write_csv(folder / "table_1_2.csv", [row.columns() | _cost_columns(results, row.system) for row in by_task])
    write_csv(folder / "table_4.csv", [row.columns() for row in by_size])
    write_csv(folder / "differences.csv", [_difference_columns(results, one) for one in verdicts])
    _draw_figures(results)
    page = folder / "report.html"
    page.write_text(make_page(results, verdicts, by_task, by_size), encoding="utf-8")
    return page


# --------------------------------------------------------------------------------------------------------------- tables


def accuracy_by_task(results: Results) -> list[AccuracyRow]:
    """Return the accuracy by system and task, on small objects and on all."""
    return [
        AccuracyRow.of(results, system, objects, task)
        for system in results.systems
        for objects in ("small", ALL)
        for task in (*results.tasks, ALL)
    ]


def accuracy_by_size(results: Results) -> list[AccuracyRow]:
    """Return the accuracy by system and size of the objects, over all tasks."""
    return [
        AccuracyRow.of(results, system, objects, ALL) for system in results.systems for objects in (*results.sizes, ALL)
    ]


def _cost_columns(results: Results, system: str) -> dict[str, Any]:
    return asdict(results.costs.get(system, Cost()))


def judge(results: Results) -> list[Verdict]:
    """Return how FlexAttention compares with the other systems, task by task and over all tasks."""
    verdicts = []
    for one in EXPECTATIONS:
        for task in (*results.tasks, ALL):
            ours, others = (results.marks(system, task, one.objects) for system in ("flexattn", one.other))
            found = paired_difference(ours, others)
            verdicts.append(Verdict(one.other, one.objects, task, one.expected, found))
    return verdicts


def _difference_columns(results: Results, verdict: Verdict) -> dict[str, Any]:
    found = verdict.found
    row = {"system": "flexattn", "minus": verdict.other, "objects": verdict.objects, "task": verdict.task}
    for name in ("difference", "error_questions", "error_seeds", "same_sign", "over_two_standard_errors", "questions"):
        row[name] = found and getattr(found, name)
    row |= {"expected": verdict.expected, "holds": verdict.holds}
    return row | {f"seed_{seed}": found and found.by_seed.get(seed) for seed in results.seeds}


# -------------------------------------------------------------------------------------------------------------- figures


def _draw_figures(results: Results) -> None:
    _draw_strategies(results)
    _draw_resolutions(results)
    if results.maps:
        _draw_maps(results)


def _on_small_objects(results: Results, system: str) -> list[Accuracy | None]:
    """Return a system's accuracy by task, over all tasks last."""
    return [accuracy(results.marks(system, task, "small")) for task in (*results.tasks, ALL)]


def _draw_strategies(results: Results) -> None:
    strategies = {}
    for system, name in STRATEGIES.items():
        share = results.costs.get(system, Cost()).selected_share
        label = name if math.isnan(share) else f"{name} ({100 * share:.0f} % of the tokens)"
        strategies[label] = _on_small_objects(results, system)
    chance = results.chance()
    groups = [*results.tasks, ALL]
    figures.draw_strategies(
        results.folder / "figure_4_left.png",
        groups,
        strategies,
        _on_small_objects(results, "llava"),
        [chance[task] for task in groups],
    )


def _draw_resolutions(results: Results) -> None:
    by_zoom = [_on_small_objects(results, system) for system in ZOOMS.values()]
    by_task = {task: [one[number] for one in by_zoom] for number, task in enumerate((*results.tasks, ALL))}
    costs = [results.costs.get(system, Cost()) for system in ZOOMS.values()]
    curves = {
        "as published": [cost.study_gflops_published for cost in costs],
        "as run here": [cost.study_gflops_here for cost in costs],
    }
    figures.draw_resolutions(results.folder / "figure_4_right.png", list(ZOOMS), by_task, curves)


def _draw_maps(results: Results) -> None:
    layers = sorted({row.layer for row in results.maps})
    by_size = grouped(results.maps, lambda row: row.size)
    maps = {
        size: {title(system): mass for system in MAPPED if len(mass := mass_by_layer(results, system, size, layers))}
        for size in results.sizes
        if size in by_size
    }
    flat = {size: mean(row.boxes for row in rows) for size, rows in by_size.items()}
    figures.draw_maps(results.folder / "supplement_figure_2.png", layers, maps, flat)


def mass_by_layer(results: Results, system: str, size: str, layers: list[int]) -> np.ndarray:
    """Return the map's mass in the answer boxes, [seeds with maps, layers] float64."""
    rows = [row for row in results.maps if (row.system, row.size) == (system, size)]
    by_seed = grouped(rows, lambda row: row.seed)
    mass = [{row.layer: row.mass for row in of_seed} for of_seed in by_seed.values()]
    return np.array([[of_seed.get(layer, math.nan) for layer in layers] for of_seed in mass])
