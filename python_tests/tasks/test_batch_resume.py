"""A file of questions: nothing is lost when a run is interrupted, and nothing is overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from question_files import SIGNS, interrupted_answers, read, signs, some, uninterrupted, write

from flexattn_cuda import load
from flexattn_cuda.errors import InputError
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks.ask_batch import Totals, answer_file
from flexattn_cuda.tasks.ask_batch import run as batch


@pytest.mark.slow
def test_a_killed_run_is_resumed(folder, asked):
    records = signs() * 4
    questions = write(folder / "q.jsonl", records)
    output, journal = folder / "a.jsonl", folder / "a.jsonl.partial.0"
    command = [sys.executable, "-m", "flexattn_cuda.cli", "ask-batch", questions, "-o", output, "--batch-size", "1"]
    run = subprocess.Popen([*command, "--device", "cpu"], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while run.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not output.exists()
    done = journal.read_bytes().split(b"\n")[1:-1]
    assert 3 <= len(done) < len(records)

    assert answer_file(questions, output, device="cpu") == Totals(len(records), 0)
    assert sum(map(len, asked)) == len(records) - len(done)
    assert [one["answer"] for one in read(output)[: len(SIGNS)]] == [one["answer"] for one in SIGNS]
    texts = [one["answer"] for one in read(output)]
    assert texts == texts[: len(signs())] * 4
    assert not journal.exists()


@pytest.mark.slow
def test_a_journal_cut_off_anywhere_is_continued(checkpoint, folder, monkeypatch, asked):
    questions = write(folder / "q.jsonl", some(6))
    output, journal = folder / "a.jsonl", folder / "a.jsonl.partial.0"
    expected = uninterrupted(checkpoint, questions)
    interrupted_answers(monkeypatch, 4, questions, output, checkpoint, "cpu", max_new_tokens=2, batch_size=1)
    content = journal.read_bytes()
    header = content.index(b"\n") + 1
    assert not output.exists() and content.count(b"\n") == 5
    last = content.rindex(b"\n", 0, -1) + 1
    cuts = [0, 1, header - 1, header, *range(last, len(content), 5), len(content) - 1, len(content)]
    model = load(checkpoint, "cpu")
    monkeypatch.setattr(loading, "load", lambda *_, **__: model)
    for torn in [content[:cut] for cut in cuts] + [content[:last] + b"\0" * 9, content + b'{"line"\n']:
        journal.write_bytes(torn)
        asked.clear()
        interrupted_answers(monkeypatch, 1, questions, output, checkpoint, "cpu", max_new_tokens=2, batch_size=1)
        answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2)
        assert read(output) == expected
        whole = [line for line in content[header:].splitlines(keepends=True) if line in torn]
        assert sum(map(len, asked)) == 6 - len(whole)
        output.unlink()


def test_nothing_is_asked_again_when_a_run_was_interrupted_before_the_output(checkpoint, folder, monkeypatch, asked):
    questions, output = write(folder / "q.jsonl", some(5)), folder / "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2)
    assert len(asked) == 1
    assert answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2) == Totals(5, 0) and len(asked) == 1


def test_another_input_model_or_setting_is_refused(checkpoint, folder, monkeypatch):
    questions, output = write(folder / "q.jsonl", some(4)), folder / "a.jsonl"
    settings = dict(model=checkpoint, device="cpu", max_new_tokens=2, batch_size=2)
    interrupted_answers(monkeypatch, 1, questions, output, **settings)
    for changed, what in [
        (dict(max_new_tokens=3), "max new tokens"),
        (dict(model=None), "model"),
        (dict(dtype="float16"), "dtype"),
    ]:
        with pytest.raises(InputError, match=rf"started with other options \({what}\);.*--restart"):
            answer_file(questions, output, **settings | changed)
    with pytest.raises(InputError, match=r"started with other options \(input\)"):
        answer_file(write(folder / "other.jsonl", some(4)), output, **settings)
    write(questions, some(5))
    with pytest.raises(InputError, match=r"started with other options \(input\)"):
        answer_file(questions, output, **settings)
    assert answer_file(questions, output, **settings, restart=True) == Totals(5, 0)


def test_an_output_is_not_overwritten(checkpoint, folder, asked):
    questions, output = write(folder / "q.jsonl", some(2)), folder / "a.jsonl"
    output.write_text("dear to me")
    with pytest.raises(InputError, match="already exists"):
        answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2)
    assert output.read_text() == "dear to me" and not asked
    assert answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2, restart=True) == Totals(2, 0)


def test_a_file_that_is_not_a_journal_is_neither_read_nor_discarded(checkpoint, folder):
    questions, stranger = write(folder / "q.jsonl", some(2)), folder / "a.jsonl.partial.0"
    stranger.write_text("dear to me")
    for restart in (False, True):
        with pytest.raises(InputError, match="is not a journal"):
            answer_file(questions, folder / "a.jsonl", checkpoint, "cpu", restart=restart)
    assert stranger.read_text() == "dear to me"


def test_a_second_run_at_the_same_time_is_refused(checkpoint, folder, monkeypatch):
    questions, output, refused = write(folder / "q.jsonl", some(2)), folder / "a.jsonl", []

    def meanwhile(*_):
        for restart in (False, True):
            with pytest.raises(InputError, match="another run is writing"):
                answer_file(questions, output, checkpoint, "cpu", restart=restart)
            refused.append(restart)
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "generate_answers", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        answer_file(questions, output, checkpoint, "cpu")
    assert refused == [False, True]
