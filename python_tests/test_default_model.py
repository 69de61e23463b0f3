"""The model that ships with the package: it answers, it needs the high resolution to do so, and it looks at the answer.

The pictures in data/held_out stand on photographs that its training has not seen (examples/make_examples.py); the figures
on 500 pictures are in examples/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flexattn_cuda

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


def questions(folder: Path) -> list[dict]:
    return json.loads((folder / "questions.json").read_text())


@pytest.fixture(scope="module")
def loaded():
    return flexattn_cuda.load(device="cpu")


def digits_right(answers: list[str], asked: list[dict]) -> float:
    pairs = [(a, b) for answer, one in zip(answers, asked) for a, b in zip(answer.ljust(2), one["answer"])]
    return sum(a == b for a, b in pairs) / len(pairs)


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
            answers[hr].append(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    exact = sum(answer == one["answer"] for answer, one in zip(answers[True], asked)) / len(asked)
    assert exact >= 0.8  # 0.9 or better on 500 pictures: these 48 may lie two standard errors below
    assert digits_right(answers[True], asked) - digits_right(answers[False], asked) >= 0.5


@pytest.mark.parametrize("example", questions(EXAMPLES), ids=lambda example: Path(example["file"]).stem)
def test_the_overlay_marks_the_region_of_the_answer(loaded, example, tmp_path):
    model, processor = loaded
    photo = EXAMPLES / example["file"]
    answer = flexattn_cuda.ask(model, processor, photo, example["question"], trace=True)
    assert answer.text == example["answer"]

    # The selected tokens that say where the answer is: those of the layer before the first one with HR tokens.
    first = model.config.flexattn.first_layer
    mask = answer.trace.steps[0][first - 1].mask[0, 0, 0].view(model.config.hr_side, model.config.hr_side)
    with Image.open(photo) as picture:
        width, height = picture.size
    left, top, right, bottom = example["box"]
    side, pad = max(width, height), ((max(width, height) - width) / 2, (max(width, height) - height) / 2)
    row = int(((top + bottom) / 2 + pad[1]) / side * model.config.hr_side)
    column = int(((left + right) / 2 + pad[0]) / side * model.config.hr_side)
    assert mask[row, column] and mask.float().mean() < 0.1

    answer.draw(tmp_path / "overlay.png", layer=first - 1)
    drawn = np.asarray(Image.open(tmp_path / "overlay.png").convert("RGB")).astype(int)[:height, :width]
    with Image.open(photo) as picture:
        before = np.asarray(picture.convert("RGB")).astype(int)
    sign = np.s_[int(top) : int(bottom), int(left) : int(right)]
    away = np.ones((height, width), bool)
    away[max(0, int(top) - side // 6) : int(bottom) + side // 6, max(0, int(left) - side // 6) : int(right) + side // 6] = False
    # Away from the answer the photograph is dimmed; the sign is not.
    assert drawn[away].mean() < before[away].mean()
    assert (drawn[sign] - before[sign]).mean() > (drawn[away] - before[away]).mean()


def test_it_is_small():
    folder = Path(flexattn_cuda.__file__).parent / "assets"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8 * 2**20
