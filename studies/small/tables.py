"""Rows of the report's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from studies.small.results import MapRow, Results, TrainingRow, grouped, mean, title
from studies.small.statistics import Accuracy, accuracy


@dataclass(frozen=True)
class AccuracyRow:
    """A system's accuracy on a task and a size.

    Attributes:
        system: The system.
        objects: Size of the objects, or "all".
        task: The task, or "all".
        found: None without answers.
    """

    system: str
    objects: str
    task: str
    found: Accuracy | None

    @classmethod
    def of(cls, results: Results, system: str, objects: str, task: str) -> AccuracyRow:
        """Compute the row from the results."""
        return cls(system, objects, task, accuracy(results.marks(system, task, objects)))

    def columns(self) -> dict[str, Any]:
        """Return the columns of the CSV file."""
        row = {"system": self.system, "title": title(self.system), "objects": self.objects, "task": self.task}
        return row | {field.name: self.found and getattr(self.found, field.name) for field in fields(Accuracy)}


@dataclass(frozen=True)
class TrainingMeans:
    """A system's fine-tuning, means over the seeds."""

    system: str
    seeds: int
    steps: float
    final_loss: float
    selected_share: float
    train_seconds: float


@dataclass(frozen=True)
class MapMeans:
    """What a layer's map lies on, means over the seeds."""

    system: str
    size: str
    layer: int
    mass: float
    largest: float
    boxes: float


def training_means(results: Results) -> list[TrainingMeans]:
    """Return the fine-tuning of the systems that have answered, in their order."""
    by_system = grouped(results.training, lambda row: row.system)
    return [
        TrainingMeans(system, len(rows), *_means(rows, "steps", "final_loss", "selected_share", "train_seconds"))
        for system in results.systems
        if (rows := by_system.get(system))
    ]


def map_means(results: Results) -> list[MapMeans]:
    """Return what the maps lie on by system, size and layer."""

    def key(row: MapRow) -> tuple[str, str, int]:
        return row.system, row.size, row.layer

    return [MapMeans(*of, *_means(rows, "mass", "largest", "boxes")) for of, rows in grouped(results.maps, key).items()]


def _means(rows: Sequence[TrainingRow] | Sequence[MapRow], *columns: str) -> list[float]:
    return [mean(getattr(row, column) for row in rows) for column in columns]
