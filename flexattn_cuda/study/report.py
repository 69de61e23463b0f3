"""Tables, figures and the page of the study, from what its runner left in a folder and nothing else.

Read (a share is in [0, 1]; a file or a column's value may be missing while a study is under way, answers.csv may not):
    answers.csv    seed, system, number, task, size ("small", "large": the objects asked for), question, expected, answer, right (0, 1)
    maps.csv       seed, system, layer (from 0), size, mass (share of the attention map in the answer boxes), largest (share of
                   questions whose largest cell is in one), boxes (the boxes' share of the cells: a flat map's mass)
    costs.csv      system, study_gflops_published, study_gflops_here, paper_tflops_published, paper_tflops_here, selected_share
    systems.csv    seed, system, steps, final_loss, selected_share (of the high-resolution tokens), train_seconds (CPU)
    study.json     command, seeds (list), chance (task -> share), and whatever else describes the study
    examples.json  list of {file, caption, question, expected, answers: {system: answer}}
    remarks.txt    optional, written by hand: paragraphs for the page

Written:
    table_1_2.csv    system, title, objects ("small", "all"), task (or "all"), accuracy (mean over seeds), deviation (over seeds),
                     wilson_low, wilson_high (95 %, over all questions), questions, seeds, and the columns of costs.csv
    table_4.csv      system, title, objects, accuracy, deviation, wilson_low, wilson_high, questions, seeds; over all tasks
    differences.csv  system, minus, objects, task, difference (mean, paired by question), error_questions, error_seeds (standard
                     errors of it), same_sign (in all seeds), over_two_standard_errors (of the larger one), expected ("above":
                     positive, with both of these; "level": not below zero by more than two), holds, questions, seeds, seed_N
    figure_4_left.png, figure_4_right.png, supplement_figure_2.png, report.html
"""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from flexattn_cuda.processing import InputError
from flexattn_cuda.study import figures
from flexattn_cuda.study.statistics import Accuracy, Difference, Marks, accuracy, paired_difference

TITLES = {
    "llava": "LLaVA, low resolution",
    "hd": "LLaVA-HD",
    "xattn": "LLaVA-XAttn",
    "flexattn": "FlexAttention",
    "flexattn-paper": "FlexAttention, as in the paper",
    "random": "FlexAttention, random selection",
    "center": "FlexAttention, central selection",
    "flexattn-zoom2": "FlexAttention, zoom 2",
    "flexattn-zoom4": "FlexAttention, zoom 4",
}
STRATEGIES = {"flexattn": "attention map", "random": "random", "center": "center"}
ZOOMS = {1: "llava", 2: "flexattn-zoom2", 3: "flexattn", 4: "flexattn-zoom4"}
EXPECTATIONS = (("llava", "small", "above"), ("random", "small", "above"), ("center", "small", "above"), ("hd", "all", "level"))
"""What the paper leads one to expect of FlexAttention: against which system, on which objects, and what."""
ALL = "all"
_COSTS = ("study_gflops_published", "study_gflops_here", "paper_tflops_published", "paper_tflops_here", "selected_share")


@dataclass
class Results:
    """What the runner left: rows of the tables with their texts, and the two JSON files."""

    folder: Path
    answers: list[dict[str, str]]
    maps: list[dict[str, str]]
    costs: dict[str, dict[str, float]]
    systems: list[dict[str, str]]
    study: dict[str, Any]
    examples: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Results:
        costs = _rows(folder / "costs.csv", ("system",))
        return cls(
            folder,
            _rows(folder / "answers.csv", ("seed", "system", "number", "task", "size", "right")),
            _rows(folder / "maps.csv", ("seed", "system", "layer", "size", "mass", "boxes")),
            {row["system"]: {name: _number(row.get(name)) for name in _COSTS} for row in costs},
            _rows(folder / "systems.csv", ("seed", "system")),
            _json(folder / "study.json", {}),
            _json(folder / "examples.json", []),
        )

    def __post_init__(self):
        if not self.answers:
            raise InputError(f"there are no answers in {self.folder / 'answers.csv'}: the report is made of a study's results")
        self.tasks = list(dict.fromkeys(row["task"] for row in self.answers))
        self.sizes = sorted({row["size"] for row in self.answers}, reverse=True)  # small, large
        there = {row["system"] for row in self.answers}
        self.there = [name for name in TITLES if name in there] + sorted(there - TITLES.keys())
        self.seeds = sorted({int(row["seed"]) for row in self.answers} | set(self.study.get("seeds", ())))
        self._rows_of: dict[str, list[tuple[int, int, str, str, bool]]] = {}
        for row in self.answers:
            marked = (int(row["seed"]), int(row["number"]), row["task"], row["size"], row["right"] == "1")
            self._rows_of.setdefault(row["system"], []).append(marked)

    def marks(self, system: str, task: str = ALL, objects: str = ALL) -> Marks:
        """What the system answered to the questions of a task and a size."""
        found: dict[int, dict[int, bool]] = {}
        for seed, number, of_task, size, right in self._rows_of.get(system, ()):
            if task in (ALL, of_task) and objects in (ALL, size):
                found.setdefault(seed, {})[number] = right
        return found

    def missing(self) -> list[str]:
        """A sentence for everything that a whole study has and this one does not."""
        told = []
        asked = {system: {seed: len(marks) for seed, marks in self.marks(system).items()} for system in self.there}
        for seed in self.seeds:
            whole = max((by_seed.get(seed, 0) for by_seed in asked.values()), default=0)
            absent = [title(system) for system in TITLES if not asked.get(system, {}).get(seed)]
            if absent:
                told.append(f"Seed {seed} has no answers of: {'; '.join(absent)}.")
            told += [f"Seed {seed}: {title(system)} has answered {by_seed[seed]} of {whole} questions."
                     for system, by_seed in asked.items() if 0 < by_seed.get(seed, 0) < whole]  # fmt: skip
        others = {"maps.csv": self.maps, "costs.csv": self.costs, "systems.csv": self.systems, "study.json": self.study, "examples.json": self.examples}
        return told + [f"There is nothing in {name}." for name, found in others.items() if not found]


@dataclass
class Verdict:
    """An expectation and what was found; `found` is None without answers."""

    other: str
    objects: str
    task: str
    expected: str
    found: Difference | None

    @property
    def holds(self) -> bool | None:
        return self.found and getattr(self.found, self.expected)

    def row(self) -> dict[str, Any]:
        row = {"system": "flexattn", "minus": self.other, "objects": self.objects, "task": self.task}
        found = self.found
        row |= {
            "difference": found.mean, "error_questions": found.error_questions, "error_seeds": found.error_seeds,
            "same_sign": found.same_sign, "over_two_standard_errors": found.over_two_errors,
        } if found else {}  # fmt: skip
        row |= {"expected": self.expected, "holds": self.holds}
        return row | ({"questions": found.questions, "seeds": len(found.by_seed)} if found else {"questions": 0, "seeds": 0})


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
    _write_csv(folder / "table_1_2.csv", table_1_2(results))
    _write_csv(folder / "table_4.csv", table_4(results))
    seeds = results.seeds
    _write_csv(folder / "differences.csv", [
        one.row() | {f"seed_{seed}": one.found.by_seed.get(seed) if one.found else None for seed in seeds} for one in verdicts
    ])  # fmt: skip
    draw_figures(results)
    page = folder / "report.html"
    page.write_text(make_page(results, verdicts), encoding="utf-8")
    return page


# --------------------------------------------------------------------------------------------------------------- tables


def title(system: str) -> str:
    return TITLES.get(system, system)


def table_1_2(results: Results) -> list[dict[str, Any]]:
    """Accuracy by system and task on small objects and on all, with costs."""
    return [
        _accuracy_row(results, system, objects, task) | results.costs.get(system, dict.fromkeys(_COSTS))
        for system in results.there
        for objects in ("small", ALL)
        for task in (*results.tasks, ALL)
    ]


def table_4(results: Results) -> list[dict[str, Any]]:
    """Accuracy by system and size of the objects, over all tasks."""
    rows = [_accuracy_row(results, system, objects, ALL) for system in results.there for objects in (*results.sizes, ALL)]
    return [{name: value for name, value in row.items() if name != "task"} for row in rows]


def _accuracy_row(results: Results, system: str, objects: str, task: str) -> dict[str, Any]:
    found = accuracy(results.marks(system, task, objects))
    values = asdict(found) if found else {"questions": 0, "seeds": 0}
    names = {"accuracy": "mean", "deviation": "deviation", "wilson_low": "low", "wilson_high": "high", "questions": "questions", "seeds": "seeds"}
    return {"system": system, "title": title(system), "objects": objects, "task": task} | {new: values.get(old) for new, old in names.items()}


def judge(results: Results) -> list[Verdict]:
    """FlexAttention against the others, task by task and over all tasks."""
    return [
        Verdict(other, objects, task, expected, paired_difference(*(results.marks(one, task, objects) for one in ("flexattn", other))))
        for other, objects, expected in EXPECTATIONS
        for task in (*results.tasks, ALL)
    ]


# -------------------------------------------------------------------------------------------------------------- figures


def draw_figures(results: Results) -> None:
    groups = [*results.tasks, ALL]

    def found(system: str) -> list[Accuracy | None]:
        return [accuracy(results.marks(system, task, "small")) for task in groups]

    strategies = {f"{name}{_share_of(results, system)}": found(system) for system, name in STRATEGIES.items()}
    chance = chances(results)
    figures.draw_strategies(results.folder / "figure_4_left.png", groups, strategies, found("llava"), [chance[task] for task in groups])

    by_zoom = [found(system) for system in ZOOMS.values()]
    costs = {
        name: [results.costs.get(system, {}).get(column, math.nan) for system in ZOOMS.values()]
        for name, column in (("as published", "study_gflops_published"), ("as run here", "study_gflops_here"))
    }
    by_task = {task: [one[number] for one in by_zoom] for number, task in enumerate(groups)}
    figures.draw_resolutions(results.folder / "figure_4_right.png", list(ZOOMS), by_task, costs)

    layers, sizes = map_layers(results), [size for size in results.sizes if any(row["size"] == size for row in results.maps)]
    maps = {
        title(system): {size: map_values(results, system, size, "mass") for size in sizes if map_values(results, system, size, "mass").size}
        for system in ("llava", "flexattn")
    }
    flat = {size: float(np.mean([float(row["boxes"]) for row in results.maps if row["size"] == size])) for size in sizes}
    figures.draw_maps(results.folder / "supplement_figure_2.png", sizes, maps, flat, layers)


def map_layers(results: Results) -> list[int]:
    return sorted({int(row["layer"]) for row in results.maps})


def map_values(results: Results, system: str, size: str, column: str) -> np.ndarray:
    """[seeds, layers] of a column of maps.csv; nan where there is none, and no seeds without rows."""
    layers, by_seed = map_layers(results), {}
    for row in results.maps:
        if (row["system"], row["size"]) == (system, size):
            by_seed.setdefault(row["seed"], np.full(len(layers), math.nan))[layers.index(int(row["layer"]))] = _number(row.get(column))
    return np.array(list(by_seed.values()))


def chances(results: Results) -> dict[str, float]:
    """By task, and their mean (tasks have as many questions each) over all."""
    given = results.study.get("chance", {})
    by_task = {task: float(given.get(task, math.nan)) for task in results.tasks}
    return by_task | {ALL: float(np.mean(list(by_task.values())))}


def _share_of(results: Results, system: str) -> str:
    share = results.costs.get(system, {}).get("selected_share", math.nan)
    return "" if math.isnan(share) else f" ({100 * share:.0f} % of the tokens)"


# ------------------------------------------------------------------------------------------------------------- the page


def make_page(results: Results, verdicts: Sequence[Verdict]) -> str:
    """The report as one HTML file: no script, nothing from outside."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flexattn_cuda", "assets/study"), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": _percent, "points": _points, "digits": _digits}
    remarks = results.folder / "remarks.txt"
    cells = {(row["system"], row["objects"], row["task"]): row for row in table_1_2(results)}
    return environment.get_template("report.html").render(
        results=results, title=title, cells=cells, sizes={(row["system"], row["objects"]): row for row in table_4(results)},
        costs=[(system, results.costs[system]) for system in results.there if system in results.costs],
        chance=chances(results), verdicts=verdicts, answer=answer(results, verdicts), missing=results.missing(),
        training=means(results.systems, ("system",), ("steps", "final_loss", "selected_share", "train_seconds")),
        maps=means(results.maps, ("system", "size", "layer"), ("mass", "largest", "boxes")), holds=_holds, image=lambda name: _data_uri(results.folder / name),
        described=list(_flat({name: value for name, value in results.study.items() if name != "command"})),
        command=results.study.get("command", ""), questions=len({(row["seed"], row["number"]) for row in results.answers}),
        remarks=remarks.read_text(encoding="utf-8").split("\n\n") if remarks.exists() else [],
    )  # fmt: skip


def answer(results: Results, verdicts: Sequence[Verdict]) -> list[str]:
    """Three sentences: against the low-resolution model, against the other strategies, against LLaVA-HD and its cost."""
    by_other = {other: [one for one in verdicts if one.other == other] for other, _, _ in EXPECTATIONS}
    shares = [
        f"{name} {_percent(found.mean)} %"
        for system, name in (("flexattn", "FlexAttention"), ("llava", "LLaVA"))
        if (found := accuracy(results.marks(system, objects="small")))
    ]
    return [
        f"Right answers about small objects: {_and(shares) or 'none yet'}; that FlexAttention is above LLaVA there {_listed(by_other['llava'])}.",
        f"That selection by the attention map is above random selection there {_listed(by_other['random'])}; that it is above selection of the center "
        f"{_listed(by_other['center'])}.",
        f"That FlexAttention is at least level with LLaVA-HD, over objects of all sizes, {_listed(by_other['hd'])}; "
        f"that it needs fewer FLOPs {_cheaper(results)}.",
    ]


def _holds(known: bool | None) -> str:
    return {True: "holds", False: "does not hold", None: "is not measured yet"}[known]


def _listed(verdicts: Sequence[Verdict]) -> str:
    """Which of them hold, over all tasks first, with the differences of that and of those that do not hold."""
    parts = []
    for known in (True, False, None):
        names = [
            ("all tasks together" if one.task == ALL else one.task) + (f" ({_with_error(one.found)})" if one.found and not (known and one.task != ALL) else "")
            for one in (verdicts[-1], *verdicts[:-1])
            if one.holds is known
        ]
        parts += [f"{_holds(known)} for {_and(names)}"] if names else []
    return ", but ".join(parts)


def _cheaper(results: Results) -> str:
    ours, other = (results.costs.get(system) for system in ("flexattn", "hd"))
    if not ours or not other:
        return _holds(None)
    pairs = [(ours[name], other[name]) for name in _COSTS[:2]]
    spent = [f"{_digits(one)} against {_digits(two)} GFLOPs {how}" for (one, two), how in zip(pairs, ("as published", "as run here"))]
    return f"{_holds(all(one < two for one, two in pairs))} ({', '.join(spent)})"


def means(rows: Sequence[dict[str, str]], keys: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Means of the columns over rows that have the keys in common (over seeds), with how many there are."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, key)) | {"seeds": len(group)} | {name: _mean(row.get(name) for row in group) for name in columns}
        for key, group in groups.items()
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _points(difference: float | None) -> str:
    return "–" if difference is None or math.isnan(difference) else f"{100 * difference:+.1f}".replace("-", "−")


def _digits(value: float | None) -> str:
    """Three significant digits, or all before the point."""
    return "–" if value is None or math.isnan(value) else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _with_error(found: Difference) -> str:
    return f"{_points(found.mean)} ± {100 * found.error:.1f} points"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _flat(values: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested dicts as lines of "a, b" and the value."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}, {key}" if name else str(key))
    else:
        yield name, f"{values:.4g}" if isinstance(values, float) else ", ".join(map(str, values)) if isinstance(values, list) else str(values)


# ---------------------------------------------------------------------------------------------------------------- files


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file; none where it is missing or empty."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and (absent := [name for name in columns if rows[0].get(name) is None]):
        raise InputError(f"{path} has no column {', '.join(absent)}")
    return rows


def _json(path: Path, otherwise: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else otherwise
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _number(text: str | None) -> float:
    return float(text) if text else math.nan


def _mean(texts: Iterable[str | None]) -> float:
    values = [float(text) for text in texts if text]
    return float(np.mean(values)) if values else math.nan


def _data_uri(path: Path) -> str | None:
    """None for a picture that is not there."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.exists() else None
