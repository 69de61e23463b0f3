"""What the study's runner leaves in a folder, for its report.

Files (a share is in [0, 1]; a file or a column's value may be missing while a study is under way, answers.csv may not):
    answers.csv    seed, system, number, task, size ("small", "large": the objects asked for), question, expected, answer, right (0, 1)
    maps.csv       seed, system, layer (from 0), size, mass (share of the attention map in the answer boxes), largest (share of
                   questions whose largest cell is in one), boxes (the boxes' share of the cells: a flat map's mass)
    costs.csv      system, study_gflops_published, study_gflops_here, paper_tflops_published, paper_tflops_here, selected_share
    systems.csv    seed, system, steps, final_loss, selected_share (of the high-resolution tokens), train_seconds (CPU)
    study.json     command, seeds (list), chance (task -> share), and whatever else describes the study
    examples.json  list of {file, caption, question, expected, answers: {system: answer}}
    remarks.txt    optional, written by hand: paragraphs for the page
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexattn_cuda.errors import InputError
from studies.small.statistics import Marks

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
MAPPED = ("llava", "flexattn")  # whose attention maps are measured, as in the supplement's figure 2
ALL = "all"  # tasks, or sizes
COSTS = (
    "study_gflops_published",
    "study_gflops_here",
    "paper_tflops_published",
    "paper_tflops_here",
    "selected_share",
)


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
            {row["system"]: {name: _number(row.get(name)) for name in COSTS} for row in costs},
            _rows(folder / "systems.csv", ("seed", "system")),
            _json(folder / "study.json", {}),
            _json(folder / "examples.json", []),
        )

    def __post_init__(self):
        if not self.answers:
            raise InputError(
                f"there are no answers in {self.folder / 'answers.csv'}: the report is made of a study's results"
            )
        self.tasks = list(dict.fromkeys(row["task"] for row in self.answers))
        self.sizes = sorted({row["size"] for row in self.answers}, reverse=True)  # small, large
        there = {row["system"] for row in self.answers}
        self.there = [name for name in TITLES if name in there] + sorted(there - TITLES.keys())
        self.seeds = sorted({int(row["seed"]) for row in self.answers} | set(self.study.get("seeds", ())))
        self._rows_of: dict[str, list[tuple[int, int, str, str, bool]]] = {}
        for row in self.answers:
            marked = (
                int(row["seed"]),
                int(row["number"]),
                row["task"],
                row["size"],
                row["right"] == "1",
            )
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
        told = (
            ["There is one seed only: what training leaves to chance is not counted."] if len(self.seeds) == 1 else []
        )
        asked = {system: {seed: len(marks) for seed, marks in self.marks(system).items()} for system in self.there}
        for seed in self.seeds:
            whole = max((by_seed.get(seed, 0) for by_seed in asked.values()), default=0)
            absent = [title(system) for system in TITLES if not asked.get(system, {}).get(seed)]
            if absent:
                told.append(
                    f"Seed {seed} has no answers of: {'; '.join(absent)}."
                    if whole
                    else f"Seed {seed} has no answers yet."
                )
            told += [f"Seed {seed}: {title(system)} has answered {by_seed[seed]} of {whole} questions."
                     for system, by_seed in asked.items() if 0 < by_seed.get(seed, 0) < whole]  # fmt: skip
        others = {
            "maps.csv": self.maps,
            "costs.csv": self.costs,
            "systems.csv": self.systems,
            "study.json": self.study,
        }
        others["examples.json"] = self.examples
        return told + [f"There is nothing in {name}." for name, found in others.items() if not found]

    def chance(self) -> dict[str, float]:
        """Share of right answers of a guess, by task and over all; tasks have as many questions each. nan where unknown."""
        given = self.study.get("chance", {})
        by_task = {task: float(given.get(task, math.nan)) for task in self.tasks}
        return by_task | {ALL: float(np.mean(list(by_task.values())))}


def title(system: str) -> str:
    return TITLES.get(system, system)


def means(rows: Sequence[dict[str, str]], keys: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Means of the columns over rows that have the keys in common (over seeds), with how many there are."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, key)) | {"seeds": len(group)} | {name: _mean(row.get(name) for row in group) for name in columns}
        for key, group in groups.items()
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All columns of any row; six digits, yes and no, and nothing for what is not there. An empty file without rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        if columns:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


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


def _number(text: str | None) -> float:
    return float(text) if text else math.nan


def _mean(texts: Iterable[str | None]) -> float:
    values = [float(text) for text in texts if text]
    return float(np.mean(values)) if values else math.nan
