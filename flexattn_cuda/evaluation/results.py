"""What a task gives on a system, and the files that hold it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from flexattn_cuda.analysis import flops
from flexattn_cuda.analysis.intervals import wilson
from flexattn_cuda.evaluation.plan import Key, Outcome
from flexattn_cuda.evaluation.published import SECONDS, TABLES, TFLOPS, Column, Table
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.runs.files import os_errors_as_input_errors, write_atomically, write_csv
from flexattn_cuda.runs.records import encode_json
from flexattn_cuda.tasks.options import CROP_SYSTEM


@dataclass(frozen=True)
class Metric:
    """A figure.

    Attributes:
        value: As lmms-eval returns it.
        low: Lower end of Wilson's 95 % interval, where the metric is a mean of marks in [0, 1]; None elsewhere.
        high: Its upper end.
        documents: Number of documents that it is about.
    """

    value: float
    low: float | None
    high: float | None
    documents: int

    @classmethod
    def of(cls, value: float, samples: Sequence[Mapping[str, Any]], name: str) -> Metric:
        """Return a metric with its interval."""
        marks = [mark for sample in samples if name in sample and (mark := mark_of(sample[name])) is not None]
        is_mean = marks and all(0 <= mark <= 1 for mark in marks) and math.isclose(sum(marks) / len(marks), value)
        low, high = wilson(sum(marks), len(marks)) if is_mean else (None, None)
        return cls(value, low, high, len(marks))


def mark_of(value: Any) -> float | None:
    """Return the mark that lmms-eval's tasks give a sample: a number, or an object with a score; None without one."""
    value = value.get("score") if isinstance(value, dict) else value
    return float(value) if isinstance(value, (bool, int, float)) else None


@dataclass(frozen=True)
class Cost:
    """What a task cost on a system.

    Attributes:
        documents: Number of documents.
        text_tokens: Tokens of a prompt besides the images', on average over the requests.
        selected: HR tokens that a layer selected, on average; None where none are selected.
        tiles: Tiles that held a selected token, on average.
        tflops_published: TFLOPs of a prompt, counted as the released code runs; None for models that are not counted,
            and for the system that crops, which is not the paper's.
        tflops_here: TFLOPs of a prompt as here; of the system that crops, of both its prompts.
        tflops_paper: What the paper says.
        seconds: Of all documents, on this machine.
        seconds_per_document: Of one.
        seconds_paper: What the paper says of all, on a V100.
        images_encoded: Number of images that were encoded.
        tiles_encoded: Number of their tiles.
    """

    documents: int
    text_tokens: float
    selected: float | None
    tiles: float | None
    tflops_published: float | None
    tflops_here: float | None
    tflops_paper: float | None
    seconds: float
    seconds_per_document: float
    seconds_paper: float | None
    images_encoded: int
    tiles_encoded: int

    @classmethod
    def of(cls, system: str, task: str, model: Any, outcomes: Mapping[Key, Outcome]) -> Cost:
        """Add up what the requests of a task cost."""
        every = list(outcomes.values())
        documents = len({key[:3] for key in outcomes})
        seconds, images = sum(one.seconds for one in every), sum(one.images for one in every)
        text = sum(one.text_tokens for one in every) / len(every)
        selected, tiles = (_mean(getattr(one, name) for one in every) for name in ("selected", "tiles"))
        settings = model.flexattn_settings
        published, here = _tflops(system, model.config, text, selected, tiles)
        return cls(
            documents=documents,
            text_tokens=text,
            selected=selected,
            tiles=tiles,
            tflops_published=published,
            tflops_here=here,
            tflops_paper=TFLOPS.get(task, {}).get(system),
            seconds=seconds,
            seconds_per_document=seconds / documents,
            seconds_paper=SECONDS.get(task, {}).get(system),
            images_encoded=images,
            tiles_encoded=0 if settings is None else images * settings.zoom**2,
        )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _tflops(
    system: str, config: Any, text: float, selected: float | None, tiles: float | None
) -> tuple[float | None, float | None]:
    """Count a prompt of the mean length with the mean selection, as published and as here; None for no count."""
    if not isinstance(config, FlexAttnLlavaConfig):
        return None, None
    length = max(1, round(text))
    if system == CROP_SYSTEM:
        # The second prompt has as many more positions, and the image that is encoded for it is the crop.
        prompts = [flops.cost(config, length + crops * config.image_tokens) for crops in (0, 1)]
        return None, sum(one.here_tflops for one in prompts)
    if selected is None or tiles is None:
        counted = flops.cost(config, length)
    else:
        per_tile = config.hr_side**2 // config.flexattn.zoom**2
        counted = flops.cost(config, length, round(selected), max(round(tiles), math.ceil(selected / per_tile)))
    return counted.published_tflops, counted.here_tflops


@dataclass(frozen=True)
class Picture:
    """An answer with its map.

    Attributes:
        file: Name of the drawing in the folder `pictures`.
        right: Whether the answer is right.
        question: The question.
        answer: What the system answered.
        target: What is right.
    """

    file: str
    right: bool
    question: str
    answer: str
    target: str


@dataclass(frozen=True)
class TaskResult:
    """What a task gave on a system.

    Attributes:
        system: The system.
        task: The task.
        metrics: By name.
        samples: As lmms-eval logs them, by number of the document.
        cost: What it cost.
        pictures: Some answers.
    """

    system: str
    task: str
    metrics: dict[str, Metric]
    samples: list[dict[str, Any]]
    cost: Cost
    pictures: list[Picture]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: one's own figure with its interval, and the paper's, in the table's unit."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    published: float | None = None


def cell(results: Sequence[TaskResult], system: str, column: Column) -> Cell:
    """Return the cell of a system."""
    found = [one.metrics.get(column.metric) for one in results if (one.system, one.task) == (system, column.task)]
    published = column.published.get(system)
    if not found or found[0] is None:
        return Cell(published=published)
    own = (found[0].value, found[0].low, found[0].high)
    return Cell(*(None if value is None else value * column.unit for value in own), published)


@dataclass(frozen=True)
class Comparison:
    """Cropping beside FlexAttention in a column of a table.

    Attributes:
        title: Of the column.
        crop: The figure of the system that crops.
        flexattn: FlexAttention's.
        flops: TFLOPs of a question, as a share of FlexAttention's; None where they are not counted.
    """

    title: str
    crop: Cell
    flexattn: Cell
    flops: float | None

    @property
    def better(self) -> bool:
        """Whether cropping has the larger figure."""
        return (self.crop.value or 0.0) > (self.flexattn.value or 0.0)

    @property
    def apart(self) -> bool:
        """Whether the intervals are known, and do not overlap."""
        ends = (self.crop.low, self.crop.high, self.flexattn.low, self.flexattn.high)
        return None not in ends and (self.crop.low > self.flexattn.high or self.flexattn.low > self.crop.high)


def comparisons(results: Sequence[TaskResult]) -> list[Comparison]:
    """Return cropping beside FlexAttention in every column that has both figures, each metric once."""
    found: dict[tuple[str, str], Comparison] = {}
    costs = {(one.system, one.task): one.cost.tflops_here for one in results}
    for column in (column for table in tables_of(results) for column in table.columns):
        crop, flexattn = (cell(results, system, column) for system in (CROP_SYSTEM, "flexattn"))
        if crop.value is not None and flexattn.value is not None:
            spent, other = (costs.get((system, column.task)) for system in (CROP_SYSTEM, "flexattn"))
            ratio = spent / other if spent and other else None
            found.setdefault((column.task, column.metric), Comparison(column.title, crop, flexattn, ratio))
    return list(found.values())


def tables_of(results: Sequence[TaskResult]) -> list[Table]:
    """Return the paper's tables for which there is a figure."""
    tasks = {one.task for one in results}
    return [table for table in TABLES if tasks & {column.task for column in table.columns}]


def write_results(folder: Path, results: Sequence[TaskResult], systems: Sequence[str]) -> None:
    """Write results.csv, costs.csv, the paper's tables and the samples; InputError if they cannot be written."""
    with os_errors_as_input_errors(folder):
        rows = [
            [one.system, one.task, name, *astuple(metric)] for one in results for name, metric in one.metrics.items()
        ]
        write_csv(folder / "results.csv", ["system", "task", "metric", "value", "low", "high", "documents"], rows)
        costs = [[one.system, one.task, *astuple(one.cost)] for one in results]
        write_csv(folder / "costs.csv", ["system", "task", *(field.name for field in fields(Cost))], costs)
        for table in tables_of(results):
            parts = ("", " low", " high", " published")
            header = ["system", *(column.title + part for column in table.columns for part in parts)]
            body = [
                [system, *(value for column in table.columns for value in astuple(cell(results, system, column)))]
                for system in systems
            ]
            write_csv(folder / f"{table.name}.csv", header, body)
        for one in results:
            path = folder / "samples" / one.system / f"{one.task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(_sample(sample, one.metrics) for sample in one.samples))


def _sample(sample: Mapping[str, Any], metrics: Mapping[str, Metric]) -> str:
    marks = {name: mark_of(sample[name]) for name in metrics if name in sample}
    record = {"doc_id": sample["doc_id"], "answers": sample["filtered_resps"], "target": str(sample["target"])} | marks
    return encode_json(record).decode() + "\n"
