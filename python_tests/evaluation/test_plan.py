"""Which questions are answered together, and what a journal keeps of them."""

from __future__ import annotations

import random

import pytest

from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation.plan import Asked, JournalledRunner, Outcome, cut
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.journal import journal_path
from flexattn_cuda.runs.processes import Processes

RUN = Fingerprint({"model": "a"})


def questions(images: int, each: int) -> list[Asked]:
    """So many questions about each image, of two kinds and many lengths, in no order."""
    made = [
        Asked(("task", "test", number, 0), number % 2, "why" * (number * 7 % 11), (f"image {number % images}",))
        for number in range(images * each)
    ]
    random.Random(0).shuffle(made)
    return made


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_every_question_is_in_one_batch_beside_those_about_the_same_image(batch_size):
    asked = questions(images=45, each=6)
    chunks = cut(asked, batch_size)
    batches = [batch for chunk in chunks for batch in chunk]
    assert sorted(number for batch in batches for number in batch) == list(range(len(asked)))
    assert all(len(batch) <= batch_size and len({asked[n].alike for n in batch}) == 1 for batch in batches)
    for alike in (0, 1):
        of_kind = [chunk for chunk in chunks if asked[chunk[0][0]].alike == alike]
        images = [{asked[n].images for batch in chunk for n in batch} for chunk in of_kind]
        assert sum(map(len, images)) == len(set().union(*images))  # no image in two chunks
        lengths = [[asked[n].length for batch in chunk for n in batch] for chunk in of_kind]
        assert all(own == sorted(own, reverse=True) for own in lengths)


def answers(asked, after: int = 10**6):
    """answer(batch) -> an outcome that differs from question to question; ends as Ctrl-C would after some batches."""
    done: list[list[int]] = []

    def answer(batch: list[int]) -> list[Outcome]:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(batch)
        return [Outcome(f"answer {asked[number].key}", 0.5, number, number / 3, 1, 0) for number in batch]

    return answer, done


def run(folder, asked, answer):
    with Processes() as processes:
        runner = JournalledRunner(processes, folder / "task", RUN, "a task", show=False)
        return runner.run(asked, cut(asked, 4), answer, "answers")


@pytest.mark.parametrize("after", [0, 1, 7, 29])
def test_a_run_that_ended_early_is_resumed_by_the_same_batches(tmp_path, after):
    asked = questions(images=20, each=6)
    answer, _ = answers(asked)
    expected = [answer([number])[0] for number in range(len(asked))]
    first, before = answers(asked, after)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, asked, first)
    second, later = answers(asked)
    assert run(tmp_path, asked, second) == expected
    assert before + later == [batch for chunk in cut(asked, 4) for batch in chunk] and len(before) == after
    third, nothing = answers(asked)
    assert run(tmp_path, asked, third) == expected and nothing == []


def test_a_batch_whose_writing_was_interrupted_is_answered_again(tmp_path):
    asked = questions(images=3, each=6)
    answer, _ = answers(asked)
    expected = run(tmp_path, asked, answer)
    path = journal_path(tmp_path / "task", 0)
    path.write_bytes(path.read_bytes()[:-9])
    again, batches = answers(asked)
    assert run(tmp_path, asked, again) == expected and len(batches) == 1


def test_other_questions_are_refused(tmp_path):
    asked = questions(images=3, each=6)
    run(tmp_path, asked, answers(asked)[0])
    for changed in (asked[:-1], [*asked[:-1], Asked(asked[-1].key, 0, "else?", asked[-1].images)]):
        with pytest.raises(InputError, match=r"started with other options \(questions\); .* discard it with --restart"):
            run(tmp_path, changed, answers(changed)[0])
