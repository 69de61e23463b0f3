"""Images and questions, files of them, and runs that are interrupted while they answer them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.ask_batch import answer_file

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SIGNS = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
QUESTION = "Which digits stand on the red sign?"


def image(width: int = 160, height: int = 120, seed: int = 3) -> Image.Image:
    """Return smooth noise."""
    values = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def write(path: Path, records: list[dict | str]) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records) + "\n")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def some(count: int) -> list[dict]:
    """Questions of different lengths about different images."""
    return [{"image": f"{number % 3}.png", "question": "why" * (1 + number * 7 % 5)} for number in range(count)]


def signs() -> list[dict]:
    """Questions for the default model: the example images, each with its own question and two of other lengths."""
    records = [{"image": str(EXAMPLES / one["file"]), "question": one["question"]} for one in SIGNS]
    colours = ["Which digits are on the sign that is blue?", "What does the sign say that is red?", "black?"]
    return records + [{"image": records[n % 4]["image"], "question": colours[n % 3]} for n in range(5)]


def interrupted_answers(monkeypatch, after: int, *arguments, **options) -> None:
    """Call `answer_file`, and end it as Ctrl-C would when `after` batches are answered."""
    generate, left = answering.generate_answers, iter(range(after))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return generate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(answering, "generate_answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer_file(*arguments, **options)


def uninterrupted(checkpoint: Path, questions: Path) -> list[dict]:
    """Return the answers of a run that nothing interrupts."""
    output = questions.with_name("uninterrupted.jsonl")
    answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2)
    return read(output)
