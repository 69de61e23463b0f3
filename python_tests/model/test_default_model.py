"""The model that ships with the package: it answers, it needs the high resolution to do so, and it looks at the answer.

The images in data/held_out stand on photographs that its training has not seen (examples/make_examples.py); the figures
on 500 images are in examples/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import flexattn_cuda
from flexattn_cuda.cli.app import app

HERE = Path(__file__).parents[1]
EXAMPLES = HERE.parent / "examples"


def questions(folder: Path) -> list[dict]:
    return json.loads((folder / "questions.json").read_text())


@pytest.fixture(scope="module")
def loaded():
    return flexattn_cuda.load(device="cpu")


def digits_right(answers: list[str], asked: list[dict]) -> float:
    pairs = [(a, b) for answer, one in zip(answers, asked) for a, b in zip(answer.ljust(2), one["answer"])]
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.mark.slow
def test_it_reads_what_only_the_high_resolution_shows(loaded):
    model, processor = loaded
    asked = questions(HERE / "data" / "held_out")
    answers = {True: [], False: []}
    for one in asked:
        inputs = processor(
            images=Image.open(HERE / "data" / "held_out" / one["file"]), text=processor.prompt(one["question"])
        )
        for hr in answers:
            given = {name: value for name, value in inputs.items() if hr or name != "pixel_values_hr"}
            output = model.generate(**given, max_new_tokens=3, do_sample=False)
            answers[hr].append(
                processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            )
    exact = sum(answer == one["answer"] for answer, one in zip(answers[True], asked)) / len(asked)
    assert exact >= 0.9  # examples/README.md has the figures on 500 images
    assert digits_right(answers[True], asked) - digits_right(answers[False], asked) >= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("example", questions(EXAMPLES), ids=lambda example: Path(example["file"]).stem)
def test_ask_marks_the_region_of_the_answer(example, tmp_path):
    image, overlay = EXAMPLES / example["file"], tmp_path / "overlay.png"
    result = CliRunner().invoke(app, ["ask", str(image), example["question"], "--map", str(overlay), "--device", "cpu"])
    assert result.exit_code == 0 and result.stdout.strip() == example["answer"]

    with Image.open(image) as image:
        before = np.asarray(image.convert("RGB")).astype(int)
    height, width = before.shape[:2]
    with Image.open(overlay) as image:
        change = np.asarray(image.convert("RGB")).astype(int)[:height, :width] - before  # the image lies at (0, 0)
    left, top, right, bottom = (int(x) for x in example["box"])
    reach = max(width, height) // 6
    away = np.ones((height, width), bool)
    away[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach] = False
    # Away from the answer the photograph is dimmed; the sign is selected and is not.
    assert change[away].mean() < -1 < 1 < change[top:bottom, left:right].mean() - change[away].mean()


def test_it_is_small():
    folder = Path(flexattn_cuda.__file__).parent / "assets"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8 * 2**20
