"""The rules by which lmms-eval compares answers of TextVQA are EvalAI's: 200 answers beside their normal forms.

Lower case; no articles; numbers up to ten as digits; contractions with their apostrophes; no full stop but before a
digit; of the other marks, those beside a space vanish, and the rest become spaces.
"""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = [pytest.mark.harness]

# fmt: off
ARTICLES_AND_NUMBERS = {
    "the dog": "dog", "The Dog": "dog", "a dog": "dog", "an owl": "owl", "A": "", "the": "", "An": "",
    "theatre": "theatre", "bathe": "bathe", "a the an": "", "the end of the road": "end of road",
    "in a box": "in box", "apple": "apple", "THE NORTH FACE": "north face", "a-team": "team", "none": "0",
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10", "eleven": "eleven", "Ten": "10", "SEVEN UP": "7 up", "one two": "1 2",
    "the three": "3", "someone": "someone", "tent": "tent", "one-way": "1 way", "twenty one": "twenty 1",
    "nineteen": "nineteen", "an 8": "8", "the one": "1", "none of the": "0 of",
}
CONTRACTED = """
    aint/ain't arent/aren't cant/can't couldve/could've couldnt/couldn't didnt/didn't doesnt/doesn't dont/don't
    hadnt/hadn't hasnt/hasn't havent/haven't hed/he'd hes/he's howd/how'd howll/how'll hows/how's isnt/isn't
    itd/it'd itll/it'll maam/ma'am mightnt/mightn't mightve/might've mustnt/mustn't mustve/must've neednt/needn't
    notve/not've oclock/o'clock oughtnt/oughtn't shant/shan't shouldve/should've shouldnt/shouldn't
    somebodyll/somebody'll somebodys/somebody's someoned/someone'd someonell/someone'll someones/someone's
    somethingd/something'd somethingll/something'll thats/that's thered/there'd therere/there're theres/there's
    theyd/they'd theyll/they'll theyre/they're theyve/they've twas/'twas wasnt/wasn't weve/we've werent/weren't
    whatll/what'll whatre/what're whats/what's whatve/what've whens/when's whered/where'd wheres/where's
    whereve/where've whod/who'd wholl/who'll whos/who's whove/who've whyll/why'll whyre/why're whys/why's
    wont/won't wouldve/would've wouldnt/wouldn't yall/y'all youd/you'd youll/you'll youre/you're youve/you've
    couldn'tve/couldn't've couldnt've/couldn't've hed've/he'd've he'dve/he'd've shed've/she'd've she'dve/she'd've
    wed've/we'd've we'dve/we'd've youd've/you'd've you'dve/you'd've yall'll/y'all'll don't/don't won't/won't
    dontknow/dontknow well/well were/were its/its im/im ill/ill
"""
CONTRACTIONS = dict(pair.split("/") for pair in CONTRACTED.split())
PUNCTUATION = {
    "stop!": "stop", "stop": "stop", "what?": "what", "coca-cola": "coca cola", "7-up": "7 up", "and/or": "and or",
    "yes, please": "yes please", "1,000": "1000", "1,000,000": "1000000", "a,b": "ab", "3.5": "3.5", "3.": "3",
    ".5": ".5", "no. 5": "no 5", "u.s.a.": "usa", "Dr. Who": "dr who", "mr.": "mr", "12.50": "12.50",
    "v1.2.3": "v1.2.3", "e.g.": "eg", "new york; ny": "new york ny", "a - b": "b", "x - y": "x y", "x -y": "x y",
    "well-known - x": "wellknown x", "(555) 123-4567": "555 123 4567", "[red]": "red", "{blue}": "blue",
    "\"quoted\"": "quoted", "50%": "50%", "$5.00": "$5.00", "10:30": "10:30", "@home": "home", "me@home": "me home",
    "a+b": "b", "x+y": "x y", "x = y": "x y", "x=y": "x y", "under_score": "under score",
    "back\\slash": "back slash", "<html>": "html", "`tick`": "tick", "rock & roll": "rock & roll", "#1": "#1",
    "it's": "it 's", "dog's": "dog 's", "dogs'": "dogs'", "joe's bar": "joe 's bar", "  spaces  ": "spaces",
    "two\nlines": "2 lines", "a\ttab": "tab", "tab\ttab": "tab tab", "": "", "?": "", "!": "",
    "hello, world!": "hello world", "yes!!!": "yes", "no...": "no", "wait...what": "waitwhat", "9/11": "9 11",
    "24/7": "24 7", "n/a": "n", "WELCOME": "welcome", "EXIT-ONLY": "exit only", "no.1": "no.1", "p.m.": "pm",
    "don't stop!": "don't stop", "the 'end'": "'end'",
}
# fmt: on
PAIRS = ARTICLES_AND_NUMBERS | CONTRACTIONS | PUNCTUATION


@pytest.fixture(scope="module")
def accuracy():
    """accuracy(said, answers) -> lmms-eval's accuracy of an answer."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.fail("lmms-eval is not installed; pip install 'flexattn_cuda[eval]', or pass -m 'not harness'")
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    return lambda said, answers: textvqa_process_results({"answers": answers, "question_id": 1}, [said])["exact_match"]


def test_there_are_two_hundred_pairs():
    assert len(PAIRS) == 200


def test_an_answer_counts_as_its_normal_form():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    normal = EvalAIAnswerProcessor()
    assert {raw: normal(raw) for raw in PAIRS} == PAIRS


def test_an_answer_of_ten_people_is_right_if_three_others_give_it(accuracy):
    """Each of the ten is left out once: min(1, matches among the other nine / 3), on average."""
    for number, raw in enumerate(PAIRS):
        matching = number % 11
        answers = [raw.upper()] * matching + ["nobody says that"] * (10 - matching)
        left_out = [matching - 1] * matching + [matching] * (10 - matching)
        expected = sum(min(1.0, others / 3) for others in left_out) / 10
        assert accuracy(raw, answers) == pytest.approx(expected, abs=1e-12), raw
