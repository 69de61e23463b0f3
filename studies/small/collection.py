"""Gathers the outcomes of all seeds and systems into the files that the report is made of."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import flexattn_cuda
from flexattn_cuda.analysis import flops
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.load import load
from studies.small.backbone import Backbone
from studies.small.backbones import BACKBONES
from studies.small.options import StudyOptions
from studies.small.outcomes import Answered, Outcome, Selection
from studies.small.photographs import find_photographs
from studies.small.presets import name_and_zoom, settings_for
from studies.small.questions import CHANCE, TASKS, vocabulary
from studies.small.results import write_csv
from studies.small.scenes import make_scenes
from studies.small.small_model import ModelSizes, build_model, build_processor
from studies.small.start import scenes_seed

EXAMPLES_PER_TASK = 2
PROMPT_TOKENS = {"study_gflops": 12, "paper_tflops": 80}
"""Text tokens of the prompt whose cost is counted, by column of costs.csv."""
_LAST_LOSSES = 50  # steps whose mean is the final loss


@dataclass(frozen=True)
class Finished:
    """A system of a seed that has answered."""

    seed: int
    system: str
    outcome: Outcome

    def row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row of a table."""
        return {"seed": self.seed, "system": self.system, **values}


def collect(options: StudyOptions, command: str) -> Path:
    """Gather what is there of all seeds and systems into OUT/results, in the form that `report.write_report` reads.

    Args:
        options: Of the study.
        command: The command that ran it.

    Returns:
        The folder OUT/results.
    """
    results = options.output / "results"
    results.mkdir(exist_ok=True)
    seeds = _seed_folders(options.output)
    finished = [
        Finished(seed, system, Outcome.read(folder / f"{system}.json"))
        for seed, folder in seeds.items()
        for system in options.settings.systems
        if (folder / f"{system}.json").exists()
    ]
    _write_tables(results, finished, options.settings.sizes)
    (results / "study.json").write_text(json.dumps(_describe(options, command, seeds), indent=1))
    if finished:
        first = finished[0].seed
        answers = {one.system: one.outcome.answers for one in finished if one.seed == first}
        numbers = options.example_numbers
        if numbers is None:
            numbers = first_small_questions(next(iter(answers.values())))
        backbone = BACKBONES[options.settings.sizes.backbone]
        examples = Examples(seeds[first], first, options.photographs, answers, backbone)
        examples.draw(results / "examples", numbers)
    return results


def _seed_folders(output: Path) -> dict[int, Path]:
    """Return the folders of the seeds that have a start, in the order of the seeds."""
    folders = [path.parent for path in output.glob("seed-*/start")]
    return dict(sorted((int(path.name[5:]), path) for path in folders if re.fullmatch(r"seed--?\d+", path.name)))


def _write_tables(results: Path, finished: Sequence[Finished], sizes: ModelSizes) -> None:
    """Write answers.csv, maps.csv, systems.csv and costs.csv."""
    write_csv(results / "answers.csv", [one.row(asdict(row)) for one in finished for row in one.outcome.answers])
    write_csv(results / "maps.csv", [one.row(asdict(row)) for one in finished for row in one.outcome.maps])
    write_csv(results / "systems.csv", [one.row(_training_row(one.outcome)) for one in finished])
    selections: dict[str, list[Selection]] = {one.system: [] for one in finished}
    for one in finished:
        selections[one.system] += [one.outcome.selected] if one.outcome.selected else []
    if sizes.backbone == "llava":  # whose FLOPs `flexattn flops` counts
        write_csv(results / "costs.csv", [costs(system, sizes, _mean(own)) for system, own in selections.items()])


def _training_row(outcome: Outcome) -> dict[str, Any]:
    last = outcome.losses[-_LAST_LOSSES:]
    return {
        "steps": len(outcome.losses),
        "final_loss": sum(last) / len(last),
        "selected_share": outcome.selected and outcome.selected.share,
        "train_seconds": outcome.seconds,
    }


def _mean(selections: Iterable[Selection]) -> Selection | None:
    selections = list(selections)
    if not selections:
        return None
    share, tiles = (sum(values) / len(selections) for values in zip(*((one.share, one.tiles) for one in selections)))
    return Selection(share, tiles)


def _describe(options: StudyOptions, command: str, seeds: Mapping[int, Path]) -> dict[str, Any]:
    """Return what results/study.json says of the study."""
    return {
        "command": command,
        "preset": options.preset,
        "seeds": list(seeds),
        "chance": CHANCE,
        "settings": asdict(options.settings),
        "starts": {folder.name: json.loads((folder / "start" / "start.json").read_text()) for folder in seeds.values()},
        "versions": {
            "flexattn_cuda": flexattn_cuda.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def costs(system: str, sizes: ModelSizes, selected: Selection | None) -> dict[str, Any]:
    """Return a row of costs.csv: the FLOPs of a question's prefill at the study's sizes and at LLaVA-1.5-7B's.

    Tiles are rounded up: the selected tokens fit into the mean number of tiles, and so into these.

    Args:
        system: A system of the study.
        sizes: Of the study's model.
        selected: What the maps select on average; None for systems that do not select.
    """
    processor = build_processor(vocabulary(), None, sizes)
    small = build_model(processor, settings_for(system, sizes), sizes).config
    large = flops.as_system(flops.llava_shape("7b"), *name_and_zoom(system))
    row: dict[str, Any] = {"system": system}
    for name, config, unit in (("study_gflops", small, 1e9), ("paper_tflops", large, 1e12)):
        chosen = {}
        if selected is not None:
            tokens, tiles = round(selected.share * config.hr_side**2), max(1, math.ceil(selected.tiles))
            chosen = {"selected": tokens, "tiles": tiles}
        spent = flops.cost(config, PROMPT_TOKENS[name], **chosen)
        row[f"{name}_published"] = sum(spent.published.values()) / unit
        row[f"{name}_here"] = sum(spent.here.values()) / unit
    return row | {"selected_share": selected and selected.share}


def first_small_questions(answers: Sequence[Answered]) -> list[int]:
    """Return the numbers of the first questions of each task about small objects."""
    numbers = []
    for task in TASKS:
        of_task = [row.number for row in answers if (row.task, row.size) == (task, "small")]
        numbers += of_task[:EXAMPLES_PER_TASK]
    return numbers


class Examples:
    """Questions of a seed with all systems' answers, as the report shows them.

    Args:
        folder: The seed's folder, OUT/seed-N.
        seed: The seed.
        photographs: Folders of JPEG files.
        answers: By system.
        backbone: Of the study's models.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        photographs: Sequence[Path],
        answers: Mapping[str, Sequence[Answered]],
        backbone: Backbone,
    ):
        self._asked_about = backbone.asked_about
        self._scenes_seed = scenes_seed(seed, "questions")
        self._held_out = find_photographs(photographs, held_out=True)
        self._answers = {system: {row.number: row for row in rows} for system, rows in answers.items()}
        self._flexattn = load(folder / "flexattn", "cpu") if "flexattn" in answers else None

    def draw(self, folder: Path, numbers: Sequence[int]) -> None:
        """Write an image for each question, and examples.json beside the folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        listed = [self._draw(folder, number) for number in numbers]
        (folder.parent / "examples.json").write_text(json.dumps(listed, indent=1))

    def _draw(self, folder: Path, number: int) -> dict[str, Any]:
        """Draw the image of a question, with what FlexAttention looked at, and return its entry in examples.json."""
        asked = next(iter(self._answers.values()))[number]
        (scene,) = make_scenes(self._held_out, 1, self._scenes_seed, first=number)
        image, file = scene.image, f"{number:04d}.png"
        if self._flexattn is not None:
            image = answering.ask(*self._flexattn, self._asked_about(image), asked.question, 4, trace=True).draw()
        image.save(folder / file)
        return {
            "file": f"{folder.name}/{file}",
            "caption": f"{asked.task}, {asked.size} objects",
            "question": asked.question,
            "expected": asked.expected,
            "answers": {system: rows[number].answer for system, rows in self._answers.items()},
        }
