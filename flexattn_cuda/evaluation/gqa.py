"""The attention maps of a model on GQA, scored by layer (supplement A.3, figure 2).

The folder holds GQA's own files of the validation set, whose scene graphs are published:

    val_balanced_questions.json   {"05451384": {"imageId": "2382986", "question": "...", "semantic": [...],
                                   "annotations": {"question": {"4": "681267"}, "fullAnswer": {...}, ...}, ...}, ...}
    val_sceneGraphs.json          {"2382986": {"width": 500, "height": 333, "objects": {"681267": {"x": 1, "y": 2,
                                   "w": 3, "h": 4, ...}, ...}}, ...}
    images/2382986.jpg

The score is that of GQA's evaluation script: over the objects that question and full answer refer to, the sum of the
attention on each. A cell counts with the share of it that lies on the object, and overlapping objects count twice. The
cells of our maps lie where the model saw them: those on the padding of an image lie on no object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation.data import SHORT_ANSWER, field, read_json
from flexattn_cuda.inputs.frames import Frame

FOLDER = "gqa_map"
SOURCE = "the questions, scene graphs and images of GQA"
QUESTIONS, SCENES = "val_balanced_questions.json", "val_sceneGraphs.json"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the questions of a folder, each with its image's path and the `regions` that it is about.

    Regions are [left, top, right, bottom] in shares of the image.

    Raises:
        InputError: If a file is missing or has another format, or a question lacks a field, an object or its image.
    """
    file, scenes = folder / QUESTIONS, read_json(folder / SCENES)
    questions = read_json(file)
    if not isinstance(questions, dict) or not questions:
        raise InputError(f"{file} is no object of questions by their ids")
    return [_row(folder, name, question, scenes) for name, question in questions.items()]


def _row(folder: Path, name: str, question: Any, scenes: Any) -> dict[str, Any]:
    where = f"question {name} of {folder / QUESTIONS}"
    text, number = (field(question, key, str, where) for key in ("question", "imageId"))
    scene = field(scenes, number, dict, f"{folder / SCENES}, which {where} needs,")
    image = folder / "images" / f"{number}.jpg"
    if not image.is_file():
        raise InputError(f"{where} is about {image}, which is not there; unpack GQA's images")
    annotations = field(question, "annotations", dict, where)
    pointers = [
        pointer for part in ("question", "fullAnswer") for pointer in field(annotations, part, dict, where).values()
    ]
    regions = [_region(scene, pointer, where) for pointer in pointers]
    if any("scene" in step for step in question.get("semantic", [])):  # as in GQA's script
        regions.append([0.0, 0.0, 1.0, 1.0])
    return {"image": str(image), "question": text, "regions": regions}


def _region(scene: Mapping[str, Any], pointer: str, where: str) -> list[float]:
    try:
        width, height, found = scene["width"], scene["height"], scene["objects"][pointer]
        return [
            found["x"] / width,
            found["y"] / height,
            (found["x"] + found["w"]) / width,
            (found["y"] + found["h"]) / height,
        ]
    except (KeyError, TypeError) as error:
        raise InputError(f"{where} refers to object {pointer}, of which {SCENES} has no {error}") from None


def prompt(doc: Mapping[str, Any]) -> str:
    """Return what is asked: the question, and the request for a short answer."""
    return f"{doc['question']}\n{SHORT_ANSWER}"


def map_score(attention: np.ndarray, frame: Frame, size: tuple[int, int], regions: Sequence[Sequence[float]]) -> float:
    """Return the attention on some regions of an image, added up.

    Args:
        attention: [rows, cols] float, not negative; its sum counts as 1.
        frame: Where its cells lie, in pixels of the image.
        size: Width and height of the image in pixels.
        regions: Each as left, top, right and bottom, in shares of the image.
    """
    rows, columns = attention.shape
    score, total = 0.0, float(attention.sum())
    for left, top, right, bottom in regions:
        across = _covered(columns, frame.left, frame.width, left * size[0], right * size[0])
        down = _covered(rows, frame.top, frame.height, top * size[1], bottom * size[1])
        score += float(down @ attention.astype(np.float64) @ across) / total
    return score


def _covered(cells: int, start: float, length: float, begin: float, end: float) -> np.ndarray:
    """Return the share of each cell of an axis, which starts at `start`, that lies between begin and end: [cells]."""
    edges = start + np.arange(cells + 1) * length / cells
    inside = np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin)
    covered: np.ndarray = inside.clip(0) * cells / length
    return covered


def scores_by_layer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the score of each layer's map, as a metric of the layer; layers are counted from 0.

    Args:
        doc: The question.
        results: The answer of the model: a JSON object with the scores by layer, see `FlexAttn.generate_until`.
    """
    scores = json.loads(results[0])["map_scores"]
    return {f"gqa_map_layer_{int(layer):02d}": score for layer, score in scores.items()}
