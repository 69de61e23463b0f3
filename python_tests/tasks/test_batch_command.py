"""`flexattn ask-batch`: what is refused, and how progress is printed."""

from __future__ import annotations

import pytest
from question_files import read, some, write
from refusals import refused

from flexattn_cuda.runs import progress as report
from flexattn_cuda.tasks import load as loading


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.jsonl", "-o", "a.jsonl"], "nowhere.jsonl cannot be read: No such file"),
        (["empty.jsonl", "-o", "a.jsonl"], "empty.jsonl holds no questions"),
        (["q.jsonl", "-o", "no/folder/a.jsonl"], "there is no folder"),
        (["q.jsonl", "-o", "."], "it is a folder"),
        (["q.jsonl", "-o", "-"], "output is '-', but standard input and output cannot be used"),
        (["-", "-o", "a.jsonl"], "input is '-', but standard input and output cannot be used"),
        (["q.jsonl", "-o", "./q.jsonl"], "would overwrite the questions"),
        (["q.jsonl", "-o", "./q.jsonl", "--restart"], "would overwrite the questions"),
        (["q.jsonl", "-o", "a.jsonl", "--batch-size", "0"], "batch size is 0"),
        (["q.jsonl", "-o", "a.jsonl", "--max-new-tokens", "0"], "must be at least 1"),
        (["q.jsonl", "-o", "a.jsonl", "--device", "tpu"], "allowed: auto, cpu, cuda"),
        (["q.jsonl", "-o", "a.jsonl", "--dtype", "int8"], "allowed: auto, float32"),
        (["q.jsonl", "-o", "a.jsonl", "--model", "nowhere"], "no checkpoint 'nowhere'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(flexattn, folder, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    before = write(folder / "q.jsonl", some(2)).read_bytes()
    (folder / "empty.jsonl").write_text("\n\n")
    assert says in refused(flexattn("ask-batch", *arguments))
    assert (folder / "q.jsonl").read_bytes() == before and not list(folder.glob("*.partial*"))


@pytest.mark.parametrize("terminal", [False, True])
def test_the_command_prints_progress(flexattn, checkpoint, folder, monkeypatch, terminal):
    monkeypatch.setattr(report, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    questions, output = write(folder / "q.jsonl", some(3)), folder / "a.jsonl"
    options = ("--model", checkpoint, "--max-new-tokens", 1, "--batch-size", 2)
    code, out, err = flexattn("ask-batch", questions, "-o", output, *options)
    assert (code, out) == (0, "") and err.endswith(f"wrote {output}: answers 3, errors 0\n")
    assert len(read(output)) == 3
    if terminal:
        assert "3/3" in err and "per second" in err and "left" in err
    else:
        first, second, _ = err.splitlines()
        assert first.startswith("2 of 3 questions, ") and second.startswith("3 of 3 questions, ")
        assert " per second, 0:00:0" in first and second.endswith(" per second, 0:00:00 left")


@pytest.mark.parametrize("missing, code", [(1, 0), (2, 1)])
def test_a_run_that_answers_nothing_ends_with_exit_code_1(flexattn, checkpoint, folder, missing, code):
    records = some(2)
    for record in records[:missing]:
        record["image"] = "nowhere.png"
    questions, output = write(folder / "q.jsonl", records), folder / "a.jsonl"
    options = ("--model", checkpoint, "--max-new-tokens", 1)
    assert flexattn("ask-batch", questions, "-o", output, *options)[0] == code
    assert sum("error" in one for one in read(output)) == missing
