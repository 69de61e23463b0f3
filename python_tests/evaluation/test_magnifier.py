"""MagnifierBench: what is asked, and the letter of an answer."""

from __future__ import annotations

import pytest

from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation import magnifier


@pytest.mark.parametrize(
    "options",
    ["A. 7, B. on the left, far away, C. It is. D. D. Smith", "A. 7\nB. on the left, far away\nC. It is.\nD. D. Smith"],
)
def test_each_option_is_on_a_line_of_its_own(options):
    asked = magnifier.prompt({"instruction": f"Where is the sign, U.S.A. or not? {options}"})
    assert asked.splitlines() == [
        "Where is the sign, U.S.A. or not?",
        "A. 7",
        "B. on the left, far away",
        "C. It is.",
        "D. D. Smith",
        "Answer with the option's letter from the given choices directly.",
    ]


@pytest.mark.parametrize("instruction", ["What is it?", "A. 7, B. 8, C. 9, D. 10", "What? A. 7, B. 8, C. 9"])
def test_an_instruction_without_four_options_is_refused(instruction):
    with pytest.raises(InputError, match=r"of question 9 is .*; it must end in options 'A\. \.\.\., B"):
        magnifier.prompt({"id": "9", "instruction": instruction})


@pytest.mark.parametrize(
    "answer, right",
    [("C", 1), ("C.", 1), ("(C) 12", 1), ("The answer is C", 1), ("B, not C", 0), ("c", 0), ("CAB", 0), ("", 0)],
)
def test_the_first_letter_that_stands_alone_is_the_answer(answer, right):
    assert magnifier.accuracy({"answer": "C"}, [answer]) == {"magnifier_acc": right}
