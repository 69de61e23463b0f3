"""The journal of `ask-batch`: damage is noticed, costs the damaged line alone, and is said."""

from __future__ import annotations

import os
import resource

import pytest
from question_files import image, interrupted_answers, read, some, uninterrupted, write

from flexattn_cuda import load
from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.versions import FileVersion
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks.ask_batch import answer_file
from flexattn_cuda.tasks.ask_batch.journal import Journal, read_journal
from flexattn_cuda.tasks.ask_batch.lines import Result

RUN = Fingerprint({"input": {"path": "q.jsonl", "hash": "0f"}, "max new tokens": 32})
ANSWERS = {
    number: Result(text, image=FileVersion(209_285, 1_796_060_842_039_890_520 + number, "ab" * 32))
    for number, text in [(3, "42"), (1, "ein Schild, „rot“"), (12, ""), (7, "\udcff"), (2, "seven\nlines\t")]
}


def written(path, answers=ANSWERS, run=RUN):
    with Journal(path, run) as journal:
        for number, result in answers.items():
            journal.append_results({number: result})
    return path.read_bytes()


def test_a_journal_holds_answers_alone_and_goes_on_after_a_cut(tmp_path):
    path = tmp_path / "journal"
    content = written(path, ANSWERS | {4: Result(error="there is no image")})
    assert read_journal(path, RUN).answers == ANSWERS
    path.write_bytes(content[:-1])
    assert read_journal(path, RUN).answers == {number: ANSWERS[number] for number in [3, 1, 12, 7]}
    assert written(path, {2: ANSWERS[2]}) == content


def test_a_flipped_bit_costs_one_line_and_never_changes_an_answer(tmp_path):
    path = tmp_path / "journal"
    content = written(path)
    starts = [at + 1 for at, byte in enumerate(content[:-1]) if byte == ord("\n")]
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = read_journal(path, RUN)
        lost = ANSWERS.keys() - found.answers.keys()
        joined = content[bit // 8] == ord("\n")  # the line break between two lines
        in_header = bit // 8 < starts[0]
        assert found.answers == {number: ANSWERS[number] for number in ANSWERS if number not in lost}
        assert len(lost) <= (not in_header) + joined
        is_cut = bit // 8 == len(content) - 1
        assert found.damaged >= (0 if is_cut else 1)


def test_a_journal_of_another_run_is_refused_even_if_its_header_is_damaged(tmp_path):
    path, other = tmp_path / "journal", RUN.with_facts(max_new_tokens=9)
    content = written(path, run=other)
    with pytest.raises(InputError, match=r"started with other options \(max new tokens\)"):
        read_journal(path, RUN)
    path.write_bytes(content.replace(b"q.jsonl", b"r.jsonl", 1))
    with pytest.raises(InputError, match="damaged or of an earlier version .*; discard it with --restart"):
        read_journal(path, RUN)
    assert len(read_journal(path, other).answers) == len(ANSWERS)


def test_a_journal_without_checksums_is_refused(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b'{"format": "journal of flexattn ask-batch, 1", "input": {}}\n{"line": 1, "answer": "42"}\n')
    with pytest.raises(InputError, match="damaged or of an earlier version .*; discard it with --restart"):
        read_journal(path, RUN)


def test_a_full_disk_is_reported_and_costs_the_line_that_did_not_fit(tmp_path):
    path, limits = tmp_path / "journal", resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = len(written(path, {3: ANSWERS[3]}))
    try:
        with Journal(path, RUN) as journal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 40, limits[1]))
            with pytest.raises(InputError, match="journal cannot be written: File too large"):
                journal.append_results({1: ANSWERS[1]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == whole + 40
    assert read_journal(path, RUN).answers == {3: ANSWERS[3]} and path.stat().st_size == whole


@pytest.fixture
def interrupted(checkpoint, folder, monkeypatch):
    """(questions, output, options, expected answers) of a run that was interrupted after four of six questions."""
    questions, output = write(folder / "q.jsonl", some(6)), folder / "a.jsonl"
    options = dict(model=checkpoint, device="cpu", max_new_tokens=2, batch_size=1)
    expected = uninterrupted(checkpoint, questions)
    interrupted_answers(monkeypatch, 4, questions, output, **options)
    return questions, output, options, expected


def test_a_damaged_answer_is_asked_again_and_it_is_said(interrupted, asked, capsys):
    questions, output, options, expected = interrupted
    journal = output.with_name("a.jsonl.partial.0")
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"answer": "', b'"answer": "\x00', 1)
    journal.write_bytes(b"".join(lines))
    answer_file(questions, output, **options, progress=True)
    assert read(output) == expected and sum(map(len, asked)) == 3
    assert "1 damaged lines of the journals were passed over" in capsys.readouterr().err


def test_an_image_that_was_replaced_is_refused(interrupted, folder):
    questions, output, options, expected = interrupted
    old, times = (folder / "0.png").read_bytes(), (folder / "0.png").stat()
    image(seed=9).save(folder / "0.png")
    with pytest.raises(InputError, match=r"images have changed .* the first is .*0.png; .* --restart"):
        answer_file(questions, output, **options)
    (folder / "0.png").write_bytes(old)  # at another time, but with the same content
    os.utime(folder / "1.png", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    answer_file(questions, output, **options)
    assert read(output) == expected


def test_an_image_of_the_same_size_that_was_replaced_is_refused(interrupted, folder):
    questions, output, options, _ = interrupted
    changed = bytearray((folder / "0.png").read_bytes())
    changed[-20] ^= 1
    (folder / "0.png").write_bytes(changed)
    with pytest.raises(InputError, match="images have changed"):
        answer_file(questions, output, **options)


def test_a_line_that_failed_is_tried_again(checkpoint, folder, monkeypatch):
    records = [*some(2), {"image": "late.png", "question": "y"}]
    questions, output = write(folder / "q.jsonl", records), folder / "a.jsonl"
    options = dict(model=checkpoint, device="cpu", max_new_tokens=2, batch_size=3)
    model = load(checkpoint, "cpu")
    monkeypatch.setattr(loading, "load", lambda *_, **__: model)
    monkeypatch.setattr(
        "flexattn_cuda.tasks.ask_batch.run._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        answer_file(questions, output, **options)
    monkeypatch.undo()
    image(seed=5).save(folder / "late.png")
    assert answer_file(questions, output, **options).errors == 0


def test_a_version_is_that_of_a_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    version = FileVersion.of(path)
    assert version.is_still(path) and replace_time(version).is_still(path)
    path.write_bytes(b"two")
    assert not replace_time(version).is_still(path)
    path.unlink()
    assert not version.is_still(path)


def replace_time(version: FileVersion) -> FileVersion:
    return version._replace(mtime_ns=version.mtime_ns - 1)
