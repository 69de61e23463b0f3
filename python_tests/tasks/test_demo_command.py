"""`flexattn demo`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from question_files import EXAMPLES, QUESTION, SIGNS
from refusals import refused

from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.examples import examples_folder, read_examples
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
    assert [path.name for path in (tmp_path / "out").glob("*_image.png")] == ["01_image.png"]


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


def test_demo_leaves_files_for_the_other_commands(flexattn, checkpoint, examples, tmp_path):
    output = tmp_path / "out"
    for _ in range(2):  # also where they lie already
        options = ("--model", checkpoint, "--output", output, "--max-new-tokens", 3)
        assert flexattn("demo", "--examples", examples, *options)[0] == 0
    assert (output / "image.png").read_bytes() == (examples / "photographs" / "image.png").read_bytes()
    [question] = [json.loads(line) for line in (output / "questions.jsonl").read_text().splitlines()]
    assert question == {"image": "image.png", "question": QUESTION}
    [record] = json.loads((output / "records.json").read_text())
    assert record["image"] == "image.png" and record["conversations"][0]["value"] == f"<image>\n{QUESTION}"


def test_demo_refuses_examples_that_it_cannot_leave(flexattn, examples, tmp_path, monkeypatch):
    monkeypatch.setattr("flexattn_cuda.tasks.load.load", lambda *_, **__: pytest.fail("the model was loaded"))
    questions = json.loads((examples / "questions.json").read_text())
    for more, says in (({"file": "nowhere.png"}, "there is no image"), ({}, "two images of the examples are called")):
        (examples / "questions.json").write_text(json.dumps([questions[0], questions[0] | more]))
        assert says in refused(flexattn("demo", "--examples", examples, "--output", tmp_path / "out"))


def test_outside_of_the_repository_demo_asks_the_packaged_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    assert examples_folder(None) == Path("examples")
    monkeypatch.chdir(tmp_path)
    packaged = examples_folder(None)
    asked = read_examples(packaged)
    assert len(asked) == 2 and packaged.parent.name == "assets"
    named = (packaged / "LICENSES").read_text()
    for one in asked:
        original = next(sign for sign in SIGNS if sign["file"].endswith(one.file))
        assert (one.question, one.answer) == (original["question"], original["answer"])
        assert one.image.read_bytes() == (EXAMPLES / original["file"]).read_bytes() and one.file in named
