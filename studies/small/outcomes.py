"""What a fine-tuned system answered, selected and looked at: the file OUT/seed-N/SYSTEM.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from flexattn_cuda.runs.files import write_atomically


@dataclass(frozen=True)
class Answered:
    """A question and a system's answer to it.

    Attributes:
        number: Of the question's scene.
        task: One of TASKS.
        size: Of the objects, "small" or "large".
        question: Its text.
        expected: The right answer.
        answer: The system's.
        right: 1 if they are equal, else 0.
    """

    number: int
    task: str
    size: str
    question: str
    expected: str
    answer: str
    right: int


@dataclass(frozen=True)
class MapFigures:
    """Where a layer's attention map lies, means over the questions about objects of a size.

    Attributes:
        layer: Its number, from 0.
        size: "small" or "large".
        mass: Share of the map in the answer boxes.
        largest: How often the map's largest cell is in one.
        boxes: The boxes' share of the cells, which is a flat map's mass.
    """

    layer: int
    size: str
    mass: float
    largest: float
    boxes: float


@dataclass(frozen=True)
class Selection:
    """What the map selects, means over questions.

    Attributes:
        share: Share of the HR tokens.
        tiles: Number of tiles with a selected token.
    """

    share: float
    tiles: float


@dataclass(frozen=True)
class Outcome:
    """A system after its fine-tuning.

    Attributes:
        answers: To all questions.
        maps: By layer and size; empty for systems whose maps are not measured.
        selected: None for systems that do not select.
        losses: Of each step of the fine-tuning.
        seconds: CPU time of the fine-tuning.
    """

    answers: list[Answered]
    maps: list[MapFigures]
    selected: Selection | None
    losses: list[float]
    seconds: float

    def write(self, path: Path) -> None:
        """Write the outcome as JSON."""
        write_atomically(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Outcome:
        """Read what `write` wrote."""
        values = json.loads(path.read_text())
        return cls(
            answers=[Answered(**row) for row in values["answers"]],
            maps=[MapFigures(**row) for row in values["maps"]],
            selected=values["selected"] and Selection(**values["selected"]),
            losses=values["losses"],
            seconds=values["seconds"],
        )
