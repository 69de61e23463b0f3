"""`flexattn ask` with a folder: the question is asked about every image in it, in the batches of `ask-batch`."""

from __future__ import annotations

import json
import os
import shutil

import attached_checkpoint
import pytest
from question_files import image
from refusals import refused

from flexattn_cuda import ask, load

QUESTION = "why"


@pytest.fixture
def options(checkpoint):
    return ("--model", checkpoint, "--max-new-tokens", 4, "--device", "cpu")


def answers(checkpoint, folder, names) -> dict[str, str]:
    """Return what `ask` answers about each image."""
    loaded = load(checkpoint, "cpu")
    return {name: ask(*loaded, folder / name, QUESTION, 4).text for name in names}


def test_every_image_of_a_folder_has_a_line_with_its_name(flexattn, folder, checkpoint, options, asked):
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "deeper.png").mkdir()
    shutil.copy(folder / "0.png", folder / "A.PNG")
    code, out, err = flexattn("ask", folder, QUESTION, *options, "--batch-size", 3)
    expected = answers(checkpoint, folder, ["0.png", "1.png", "2.png", "A.PNG"])
    assert (code, err) == (0, "") and len(set(expected.values())) > 1
    assert out.splitlines() == [f"{name}: {text}" for name, text in expected.items()]
    assert [len(batch) for batch in asked[:2]] == [3, 1]


def test_a_bad_image_costs_its_own_line(flexattn, folder, checkpoint, options):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    (folder / "3.png").touch()
    code, out, err = flexattn("ask", folder, QUESTION, *options)
    expected = answers(checkpoint, folder, ["0.png", "2.png"])
    assert code == 0 and out.splitlines() == [f"{name}: {text}" for name, text in expected.items()]
    damaged, empty = err.splitlines()
    assert "1.png cannot be used" in damaged and "3.png is an empty file" in empty

    code, out, err = flexattn("ask", folder, QUESTION, *options, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [one["image"] for one in records] == ["0.png", "1.png", "2.png", "3.png"]
    assert {one["image"]: one["answer"] for one in records if "answer" in one} == expected
    assert "is damaged" in records[1]["error"] and "is an empty file" in records[3]["error"]
    assert {one["question"] for one in records} == {QUESTION}


def test_no_answer_at_all_is_exit_code_1(flexattn, tmp_path, options):
    (tmp_path / "0.png").touch()
    code, out, err = flexattn("ask", tmp_path, QUESTION, *options)
    assert (code, out) == (1, "") and err.count("\n") == 1


def test_a_question_that_cannot_be_asked_is_refused_once(flexattn, folder, options):
    assert "contains '</s>'" in refused(flexattn("ask", folder, "why </s>", *options))


def test_a_name_that_is_no_text_is_an_escape(flexattn, tmp_path, options):
    image().save(tmp_path / "0.png")
    os.rename(tmp_path / "0.png", os.fsencode(tmp_path) + b"/\xff.png")
    code, out, _ = flexattn("ask", tmp_path, QUESTION, *options, "--json")
    assert code == 0 and json.loads(out)["image"] == "\udcff.png"


@pytest.mark.slow
def test_a_family_whose_prompts_depend_on_the_image_answers_the_largest_first(flexattn, folder, tmp_path):
    model = attached_checkpoint.CHECKPOINTS["qwen2_vl"].save(tmp_path / "qwen")
    image(32, 24).save(folder / "0.png")
    chosen = ("--model", model, "--max-new-tokens", 4, "--device", "cpu", "--batch-size", 2)
    code, out, _ = flexattn("ask", folder, "what is this", *chosen)
    loaded = load(model, "cpu")
    lines = [f"{name}: {ask(*loaded, folder / name, 'what is this', 4).text}" for name in ("1.png", "2.png", "0.png")]
    assert code == 0 and sorted(out.splitlines()) == sorted(lines) and out.splitlines()[-1] == lines[-1]
