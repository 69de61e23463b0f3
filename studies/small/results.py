"""What the study's runner leaves in a folder for the report.

Files (a share is in [0, 1]; while a study is under way, files and values may be missing, but not answers.csv):
    answers.csv    seed, system, number, task, size ("small" or "large": the objects asked for), question, expected,
                   answer, right (0 or 1)
    maps.csv       seed, system, layer (from 0), size, mass (share of the attention map in the answer boxes), largest
                   (share of questions whose largest cell is in one), boxes (the boxes' share of the cells, which is a
                   flat map's mass)
    costs.csv      system, study_gflops_published, study_gflops_here, paper_tflops_published, paper_tflops_here,
                   selected_share
    systems.csv    seed, system, steps, final_loss, selected_share (of the HR tokens), train_seconds (CPU)
    study.json     command, seeds (list), chance (task -> share), and whatever else describes the study
    examples.json  list of {file, caption, question, expected, answers: {system: answer}}
    remarks.txt    optional, written by hand: paragraphs for the page
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

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
MAPPED = ("llava", "flexattn")  # systems whose attention maps are measured, as in the supplement's figure 2
ALL = "all"  # tasks, or sizes

Row = TypeVar("Row")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class AnswerRow:
    """A row of answers.csv, as far as the report reads it."""

    seed: int
    system: str
    number: int
    task: str
    size: str
    right: bool


@dataclass(frozen=True)
class MapRow:
    """A row of maps.csv."""

    seed: int
    system: str
    layer: int
    size: str
    mass: float
    boxes: float
    largest: float = math.nan


@dataclass(frozen=True)
class TrainingRow:
    """A row of systems.csv."""

    seed: int
    system: str
    steps: float = math.nan
    final_loss: float = math.nan
    selected_share: float = math.nan
    train_seconds: float = math.nan


@dataclass(frozen=True)
class Cost:
    """A row of costs.csv without its system: a prompt's FLOPs, and the share of the HR tokens that is selected."""

    study_gflops_published: float = math.nan
    study_gflops_here: float = math.nan
    paper_tflops_published: float = math.nan
    paper_tflops_here: float = math.nan
    selected_share: float = math.nan


@dataclass(frozen=True, kw_only=True)
class _CostRow(Cost):
    system: str


@dataclass(frozen=True)
class Example:
    """A question of the report's page, with the right answer and each system's; `file` is its image."""

    file: str
    caption: str
    question: str
    expected: str
    answers: dict[str, str]


@dataclass
class Results:
    """What the runner left.

    Attributes:
        folder: With the files.
        answers: At least one.
        maps: Empty without maps.csv.
        costs: By system.
        training: Empty without systems.csv.
        study: study.json.
        examples: Empty without examples.json.
        tasks: Those of the answers.
        sizes: Those of the answers, small before large.
        systems: Those of the answers, in the order of TITLES.
        seeds: Those of the answers and of study.json.
    """

    folder: Path
    answers: list[AnswerRow]
    maps: list[MapRow]
    costs: dict[str, Cost]
    training: list[TrainingRow]
    study: dict[str, Any]
    examples: list[Example]

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read the files of a folder.

        Raises:
            InputError: If there are no answers, or a file cannot be read.
        """
        costs = _read_table(folder / "costs.csv", _CostRow)
        return cls(
            folder,
            _read_table(folder / "answers.csv", AnswerRow),
            _read_table(folder / "maps.csv", MapRow),
            {row.system: Cost(*(getattr(row, field.name) for field in fields(Cost))) for row in costs},
            _read_table(folder / "systems.csv", TrainingRow),
            _read_json(folder / "study.json", {}),
            [Example(**values) for values in _read_json(folder / "examples.json", [])],
        )

    def __post_init__(self):
        if not self.answers:
            raise InputError(f"{self.folder / 'answers.csv'} holds no answers; run the study before its report")
        self.tasks = list(dict.fromkeys(row.task for row in self.answers))
        self.sizes = sorted({row.size for row in self.answers}, reverse=True)
        there = {row.system for row in self.answers}
        self.systems = [name for name in TITLES if name in there] + sorted(there - TITLES.keys())
        self.seeds = sorted({row.seed for row in self.answers} | set(self.study.get("seeds", ())))
        self._of_system = grouped(self.answers, lambda row: row.system)

    def marks(self, system: str, task: str = ALL, objects: str = ALL) -> Marks:
        """Return what a system answered to the questions of a task and a size."""
        marks: dict[int, dict[int, bool]] = {}
        for row in self._of_system.get(system, ()):
            if task in (ALL, row.task) and objects in (ALL, row.size):
                marks.setdefault(row.seed, {})[row.number] = row.right
        return marks

    def missing(self) -> list[str]:
        """Return a sentence for everything that a complete study has and this one lacks."""
        sentences = []
        if len(self.seeds) == 1:
            sentences.append("There is only one seed: the variance between trainings is not measured.")
        for seed in self.seeds:
            sentences += self._missing_answers(seed)
        files = {
            "maps.csv": self.maps,
            "costs.csv": self.costs,
            "systems.csv": self.training,
            "study.json": self.study,
            "examples.json": self.examples,
        }
        return sentences + [f"{name} is missing or empty." for name, found in files.items() if not found]

    def _missing_answers(self, seed: int) -> list[str]:
        counts = {system: len(self.marks(system).get(seed, ())) for system in self.systems}
        questions = max(counts.values(), default=0)
        if not questions:
            return [f"Seed {seed} has no answers yet."]
        absent = [title(system) for system in TITLES if not counts.get(system)]
        sentences = [f"Seed {seed} lacks answers from: {'; '.join(absent)}."] if absent else []
        return sentences + [
            f"Seed {seed}: {title(system)} has answered {count} of {questions} questions."
            for system, count in counts.items()
            if 0 < count < questions
        ]

    def chance(self) -> dict[str, float]:
        """Return a guess's accuracy by task and over all tasks, which have as many questions each; NaN if unknown."""
        given = self.study.get("chance", {})
        by_task = {task: float(given.get(task, math.nan)) for task in self.tasks}
        return by_task | {ALL: float(np.mean(list(by_task.values())))}


def title(system: str) -> str:
    """Return a system's name for readers."""
    return TITLES.get(system, system)


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Return the rows by key, both in order of appearance."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the columns of all rows: numbers with six digits, yes or no, and nothing for None and NaN.

    Without rows the file is empty.
    """
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


_PARSERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: lambda text: float(text) if text else math.nan,
    bool: lambda text: text == "1",
}


def _read_table(path: Path, row_type: type[Row]) -> list[Row]:
    """Return the rows of a CSV file as a dataclass whose fields are columns; none if the file is missing or empty.

    Raises:
        InputError: If a column without a default is missing, or a value has the wrong type.
    """
    if not path.exists():
        return []
    required = [field.name for field in fields(row_type) if field.default is MISSING]
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and (absent := [name for name in required if rows[0].get(name) is None]):
        raise InputError(f"{path} has no column {', '.join(absent)}")
    parsers = {name: _PARSERS[kind] for name, kind in get_type_hints(row_type).items()}
    try:
        return [
            row_type(**{name: parse(row[name]) for name, parse in parsers.items() if row.get(name) is not None})
            for row in rows
        ]
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _read_json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
