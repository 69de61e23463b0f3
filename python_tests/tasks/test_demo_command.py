"""`flexattn demo`."""

from __future__ import annotations

import json
import os

import pytest
from question_files import EXAMPLES, QUESTION, SIGNS
from refusals import refused

from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.load import load


@pytest.fixture
def examples(tmp_path, image, checkpoint):
    answer = answering.ask(*load(checkpoint), image, QUESTION, max_new_tokens=3).text
    folder = tmp_path / "examples"
    (folder / "photographs").mkdir(parents=True)
    os.rename(image, folder / "photographs" / "image.png")
    question = {"file": "photographs/image.png", "question": QUESTION, "answer": answer, "box": [0, 0, 9, 9]}
    (folder / "questions.json").write_text(json.dumps([question]))
    return folder


def test_demo_answers_and_writes_overlays(flexattn, checkpoint, examples, tmp_path):
    options = ("--model", checkpoint, "--output", tmp_path / "out", "--max-new-tokens", 3)
    code, out, _ = flexattn("demo", "--examples", examples, *options)
    assert code == 0 and "1 of 1 answers are right" in out and QUESTION in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["01_image.png"]


def test_demo_fails_when_an_answer_is_wrong(flexattn, checkpoint, examples, tmp_path):
    questions = json.loads((examples / "questions.json").read_text())
    (examples / "questions.json").write_text(json.dumps([questions[0] | {"answer": "something else"}]))
    options = ("--model", checkpoint, "--output", tmp_path / "out", "--max-new-tokens", 3)
    code, out, _ = flexattn("demo", "--examples", examples, *options)
    assert code == 1 and "WRONG, expected something else" in out and "0 of 1" in out


@pytest.mark.parametrize("content", [None, "{", "[]", '[{"file": "a.png"}]', "3", '{"a": 1}'])
def test_demo_without_examples_is_refused(flexattn, tmp_path, content):
    if content is not None:
        (tmp_path / "questions.json").write_text(content)
    refused(flexattn("demo", "--examples", tmp_path, "--output", tmp_path / "out"))


@pytest.mark.slow
def test_demo_succeeds(flexattn, tmp_path):
    code, out, _ = flexattn("demo", "--examples", EXAMPLES, "--output", tmp_path)
    assert code == 0 and f"{len(SIGNS)} of {len(SIGNS)} answers are right" in out
    assert len(list(tmp_path.glob("*.png"))) == len(SIGNS)
