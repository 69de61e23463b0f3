"""What is there of all seeds and systems, gathered into the files that the report is made of."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import flexattn_cuda
from flexattn_cuda.analysis import flops
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.load import load
from studies.small.presets import PRESETS, SYSTEMS, name_and_zoom, settings_for
from studies.small.results import write_csv
from studies.small.scenes import CHANCE, TASKS, find_photographs, make_scenes, vocabulary
from studies.small.small_model import ModelSizes, build_model, build_processor

EXAMPLES_PER_TASK = 2
PROMPT_TOKENS = {
    "study_gflops": 12,
    "paper_tflops": 80,
}  # text tokens of a prompt for which costs are counted


def collect(
    output: Path,
    photographs: Sequence[Path],
    preset: str,
    command: str,
    examples: Sequence[int] | None = None,
) -> Path:
    """Gathers what is there of all seeds and systems into OUT/results, in the form that `report.write_report` reads.

    Args:
        examples: Numbers of the lowest seed's questions that the page shows; by default the first of each task about small objects.
    """
    results = output / "results"
    results.mkdir(exist_ok=True)
    starts = [path.parent for path in output.glob("seed-*/start")]
    seeds = dict(sorted((int(path.name[5:]), path) for path in starts if re.fullmatch(r"seed--?\d+", path.name)))
    outcomes = {
        (seed, system): json.loads((folder / f"{system}.json").read_text())
        for seed, folder in seeds.items()
        for system in SYSTEMS
        if (folder / f"{system}.json").exists()
    }
    named = [({"seed": seed, "system": system}, outcome) for (seed, system), outcome in outcomes.items()]
    write_csv(results / "answers.csv", [who | row for who, outcome in named for row in outcome["answers"]])
    write_csv(results / "maps.csv", [who | row for who, outcome in named for row in outcome["maps"]])
    write_csv(results / "systems.csv", [
        who | {"steps": len(outcome["losses"]), "final_loss": _mean(outcome["losses"][-50:]),
               "selected_share": outcome["selected"] and outcome["selected"]["share"], "train_seconds": outcome["seconds"]}
        for who, outcome in named
    ])  # fmt: skip
    selected: dict[str, list[dict[str, float]]] = {system: [] for _, system in outcomes}
    for (_, system), outcome in outcomes.items():
        selected[system] += [outcome["selected"]] if outcome["selected"] else []
    write_csv(results / "costs.csv", [
        costs(system, PRESETS[preset].sizes, _mean(one["share"] for one in own), _mean(one["tiles"] for one in own))
        for system, own in selected.items()
    ])  # fmt: skip
    about = {
        "command": command,
        "preset": preset,
        "seeds": list(seeds),
        "chance": CHANCE,
        "settings": asdict(PRESETS[preset]),
        "starts": {folder.name: json.loads((folder / "start" / "start.json").read_text()) for folder in seeds.values()},
        "versions": {
            "flexattn_cuda": flexattn_cuda.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (results / "study.json").write_text(json.dumps(about, indent=1))
    if outcomes:
        first = min(seed for seed, _ in outcomes)
        given = {system: outcome["answers"] for (seed, system), outcome in outcomes.items() if seed == first}
        if examples is None:
            examples = first_about_small_objects(next(iter(given.values())))
        draw_examples(results / "examples", seeds[first], first, photographs, given, examples)
    return results


def costs(system: str, sizes: ModelSizes, share: float | None, tiles: float | None) -> dict[str, Any]:
    """A row of costs.csv: the prefill of a question, counted at the study's sizes (GFLOPs) and at LLaVA-1.5-7B's (TFLOPs), with
    the share of HR tokens and the number of tiles that the study's maps select.

    The tiles are rounded up: what is selected fits into the mean number of tiles, and then into these."""
    processor = build_processor(vocabulary(), None, sizes)
    small = build_model(processor, settings_for(system, sizes), sizes).config
    large = flops.as_system(flops.llava_shape("7b"), *name_and_zoom(system))
    row: dict[str, Any] = {"system": system}
    for name, config, unit in (("study_gflops", small, 1e9), ("paper_tflops", large, 1e12)):
        chosen = (
            {} if share is None else {"selected": round(share * config.hr_side**2), "tiles": max(1, math.ceil(tiles))}
        )
        spent = flops.cost(config, PROMPT_TOKENS[name], **chosen)
        row |= {
            f"{name}_published": sum(spent.published.values()) / unit,
            f"{name}_here": sum(spent.here.values()) / unit,
        }
    return row | {"selected_share": share}


def first_about_small_objects(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Numbers of the first questions of each task; rows: What one system answered."""
    numbers = []
    for task in TASKS:
        numbers += [row["number"] for row in rows if (row["task"], row["size"]) == (task, "small")][:EXAMPLES_PER_TASK]
    return numbers


def draw_examples(
    folder: Path,
    start: Path,
    seed: int,
    photographs: Sequence[Path],
    given: dict[str, list[dict[str, Any]]],
    numbers: Sequence[int],
) -> None:
    """The questions with these numbers, with what FlexAttention looked at drawn over the image.

    Args:
        folder: For the images; examples.json is written beside it.
        start: The seed's folder, OUT/seed-N.
        given: What each system answered.
    """
    answered = {system: {row["number"]: row for row in rows} for system, rows in given.items()}
    rows = next(iter(answered.values()))
    asked = load(start / "flexattn", "cpu") if "flexattn" in given else None
    held_out, listed = find_photographs(photographs, True), []
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    for row in (rows[number] for number in numbers):
        (scene,) = make_scenes(held_out, 1, 10 * seed + 1, first=row["number"])
        image, file = scene.image, f"{row['number']:04d}.png"
        if asked is not None:
            answer = answering.ask(*asked, image, row["question"], 4, trace=True)
            image = answer.draw()
        image.save(folder / file)
        listed.append({
            "file": f"examples/{file}", "caption": f"{row['task']}, {row['size']} objects", "question": row["question"],
            "expected": row["expected"], "answers": {system: by[row["number"]]["answer"] for system, by in answered.items()},
        })  # fmt: skip
    (folder.parent / "examples.json").write_text(json.dumps(listed, indent=1))


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
