"""Tables, figures and the page of the study, from what its runner left in a folder (see results.py) and nothing else.

Written:
    table_1_2.csv    system, title, objects ("small", "all"), task (or "all"), accuracy (mean over seeds), deviation (over seeds),
                     wilson_low, wilson_high (95 %, over all questions), questions, seeds, and the columns of costs.csv
    table_4.csv      the same without costs for all sizes of objects, over all tasks
    differences.csv  system, minus, objects, task, difference (mean, paired by question), error_questions, error_seeds (standard
                     errors of it), same_sign (in all seeds), over_two_standard_errors (of the larger one), questions, expected ("above":
                     positive, with both of these; "level": not below zero by more than two), holds, seed_N
    figure_4_left.png, figure_4_right.png, supplement_figure_2.png, report.html
"""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from studies.small import figures
from studies.small.page import make_page
from studies.small.results import ALL, COSTS, MAPPED, Results, means, title, write_csv
from studies.small.statistics import Accuracy, Verdict, accuracy, paired_difference

STRATEGIES = {"flexattn": "attention map", "random": "random", "center": "center"}
ZOOMS = {1: "llava", 2: "flexattn-zoom2", 3: "flexattn", 4: "flexattn-zoom4"}
EXPECTATIONS = (
    ("llava", "small", "above"),
    ("random", "small", "above"),
    ("center", "small", "above"),
    ("hd", "all", "level"),
)
"""What the paper leads one to expect of FlexAttention: against which system, on which objects, and what."""


def write_report(folder: Path) -> Path:
    """Writes tables, figures and the page into the results folder, see the module's text.

    Returns:
        The path of report.html.
    Raises:
        InputError: There are no answers, a file cannot be read, or matplotlib is not installed.
    """
    figures.require_matplotlib()
    folder = Path(folder)
    results = Results.read(folder)
    verdicts = judge(results)
    by_task, by_size = table_1_2(results), table_4(results)
    write_csv(folder / "table_1_2.csv", by_task)
    write_csv(folder / "table_4.csv", by_size)
    write_csv(folder / "differences.csv", [difference_row(results, one) for one in verdicts])
    draw_figures(results)
    page = folder / "report.html"
    page.write_text(make_page(results, verdicts, by_task, by_size), encoding="utf-8")
    return page


# --------------------------------------------------------------------------------------------------------------- tables


def table_1_2(results: Results) -> list[dict[str, Any]]:
    """Accuracy by system and task on small objects and on all, with costs."""
    return [
        _accuracy_row(results, system, objects, task) | results.costs.get(system, dict.fromkeys(COSTS))
        for system in results.there
        for objects in ("small", ALL)
        for task in (*results.tasks, ALL)
    ]


def table_4(results: Results) -> list[dict[str, Any]]:
    """Accuracy by system and size of the objects, over all tasks."""
    return [
        _accuracy_row(results, system, objects, ALL) for system in results.there for objects in (*results.sizes, ALL)
    ]


def _accuracy_row(results: Results, system: str, objects: str, task: str) -> dict[str, Any]:
    row = {"system": system, "title": title(system), "objects": objects, "task": task}
    found = accuracy(results.marks(system, task, objects))
    return row | {field.name: found and getattr(found, field.name) for field in fields(Accuracy)}


def judge(results: Results) -> list[Verdict]:
    """FlexAttention against the others, task by task and over all tasks."""
    return [
        Verdict(
            other,
            objects,
            task,
            expected,
            paired_difference(*(results.marks(one, task, objects) for one in ("flexattn", other))),
        )
        for other, objects, expected in EXPECTATIONS
        for task in (*results.tasks, ALL)
    ]


def difference_row(results: Results, one: Verdict) -> dict[str, Any]:
    found = one.found
    row = {"system": "flexattn", "minus": one.other, "objects": one.objects, "task": one.task}
    for name in (
        "difference",
        "error_questions",
        "error_seeds",
        "same_sign",
        "over_two_standard_errors",
        "questions",
    ):
        row[name] = found and getattr(found, name)
    row |= {"expected": one.expected, "holds": one.holds}
    return row | {f"seed_{seed}": found and found.by_seed.get(seed) for seed in results.seeds}


# -------------------------------------------------------------------------------------------------------------- figures


def draw_figures(results: Results) -> None:
    groups = [*results.tasks, ALL]

    def found(system: str) -> list[Accuracy | None]:
        return [accuracy(results.marks(system, task, "small")) for task in groups]

    strategies = {f"{name}{_share_of(results, system)}": found(system) for system, name in STRATEGIES.items()}
    chance = results.chance()
    figures.draw_strategies(
        results.folder / "figure_4_left.png",
        groups,
        strategies,
        found("llava"),
        [chance[task] for task in groups],
    )

    by_zoom = [found(system) for system in ZOOMS.values()]
    costs = {
        name: [results.costs.get(system, {}).get(column, math.nan) for system in ZOOMS.values()]
        for name, column in (
            ("as published", "study_gflops_published"),
            ("as run here", "study_gflops_here"),
        )
    }
    by_task = {task: [one[number] for one in by_zoom] for number, task in enumerate(groups)}
    figures.draw_resolutions(results.folder / "figure_4_right.png", list(ZOOMS), by_task, costs)

    if results.maps:
        sizes = [size for size in results.sizes if any(row["size"] == size for row in results.maps)]
        maps = {
            size: {title(system): mass for system in MAPPED if len(mass := mass_by_layer(results, system, size))}
            for size in sizes
        }
        flat = {row["size"]: row["boxes"] for row in means(results.maps, ("size",), ("boxes",))}
        figures.draw_maps(results.folder / "supplement_figure_2.png", map_layers(results), maps, flat)


def map_layers(results: Results) -> list[int]:
    return sorted({int(row["layer"]) for row in results.maps})


def mass_by_layer(results: Results, system: str, size: str) -> np.ndarray:
    """[seeds that have maps, layers] from maps.csv."""
    rows = [row for row in results.maps if (row["system"], row["size"]) == (system, size)]
    mass = {(row["seed"], int(row["layer"])): float(row["mass"]) for row in rows}
    seeds = dict.fromkeys(row["seed"] for row in rows)
    return np.array([[mass.get((seed, layer), math.nan) for layer in map_layers(results)] for seed in seeds])


def _share_of(results: Results, system: str) -> str:
    share = results.costs.get(system, {}).get("selected_share", math.nan)
    return "" if math.isnan(share) else f" ({100 * share:.0f} % of the tokens)"
