"""A model of few words mends typing errors in those that matter, and reports the words that it does not know."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import string
from pathlib import Path

import pytest

from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.inputs.vocabulary import Vocabulary
from studies.default_model.encoder import SIZES
from studies.default_model.processor import build_processor
from studies.small.presets import settings_for
from studies.small.small_model import build_model

WORDS = ("what", "number", "is", "on", "the", "red", "green", "sign", "write", "a")
SPELLING = Vocabulary(WORDS, ("number", "green", "red", "sign"), "ask about signs")


def typing_errors(word: str) -> list[str]:
    """All words that differ from a word in one letter: left out, put in, changed, or swapped with the next."""
    letters, places = string.ascii_lowercase, range(len(word))
    left_out = [word[:k] + word[k + 1 :] for k in places]
    put_in = [word[:k] + letter + word[k:] for k in range(len(word) + 1) for letter in letters]
    changed = [word[:k] + letter + word[k + 1 :] for k in places for letter in letters]
    swapped = [word[:k] + word[k + 1] + word[k] + word[k + 2 :] for k in places[:-1]]
    return [*left_out, *put_in, *changed, *swapped]


def test_a_word_with_one_typing_error_is_taken_for_the_keyword():
    for keyword in ("number", "green"):
        assert {SPELLING.spelled(word) for word in typing_errors(keyword)} == {keyword}
    assert SPELLING.spelled("What nubmer is on the <image> Sing?") == "what number is on the <image> sign?"


def test_a_short_keyword_keeps_its_first_letter_and_its_length():
    assert SPELLING.spelled("rad rde") == "red red"
    for word in ("bed", "redd", "re", "ered"):
        with pytest.raises(InputError, match=f"does not know: {word}; ask about signs"):
            SPELLING.spelled(word)


def test_words_with_more_errors_are_reported_each_once_as_they_were_written():
    with pytest.raises(InputError, match="^the model does not know: Yellow, bmuner, café; ask about signs$"):
        SPELLING.spelled("Yellow bmuner is on the café, Yellow?")


def test_known_words_that_look_like_keywords_stay():
    assert SPELLING.spelled("write the sign") == "write the sign"
    with pytest.raises(InputError, match="white"):
        SPELLING.spelled("the white sign")  # "write" is known, but is no keyword


@pytest.fixture(scope="module")
def processor() -> FlexAttnLlavaProcessor:
    return build_processor(settings_for("flexattn", SIZES))


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory) -> Path:
    """The processor in a checkpoint, without weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor.save_pretrained(folder)
    build_model(processor, settings_for("flexattn", SIZES), SIZES).config.save_pretrained(folder)
    return folder


def test_every_unknown_word_is_reported(processor):
    unknown = (
        "yellow",
        "orange",
        "white",
        "pink",
        "gold",
        "silver",
        "house",
        "dog",
        "cat",
        "weather",
        "price",
        "owner",
    )
    forms = ("What number is on the {} sign?", "Is there a {} sign?", "Where is the {}?", "how many {}s are there")
    asked = [form.format(word) for form, word in itertools.product(forms, unknown)]
    for question in asked:
        with pytest.raises(InputError, match="does not know: .*; it reads numbers, words and shapes"):
            processor.tokenize(processor.prompt(question))
    rng = random.Random(0)
    for _ in range(200 - len(asked)):
        word = "".join(rng.choices("qxzjkvw", k=rng.randint(5, 9)))
        with pytest.raises(InputError, match=f"does not know: {word};"):
            processor.tokenize(processor.prompt(f"what {word} is on the red sign?"))


def test_a_typing_error_gives_the_same_prompt(processor):
    expected = processor.tokenize(processor.prompt("What number is on the purple sign"))
    for question in (
        "what nubmer is on the purple sign?",
        "What number is on teh purpl sgin",
        "WHAT NUMBER IS ON THE PURPLE SIGN",
    ):
        assert processor.tokenize(processor.prompt(question)) == expected


def test_a_saved_processor_reports_unknown_words_too(folder):
    with pytest.raises(InputError, match="does not know: yellow; it reads numbers"):
        FlexAttnLlavaProcessor.from_pretrained(folder).prompt("What is on the yellow sign?")


def test_a_processor_without_keywords_takes_any_word(processor):
    free = FlexAttnLlavaProcessor(processor.image_processor, processor.tokenizer)
    assert free.tokenize("what yellow house")


@pytest.mark.parametrize("values", [{"keywords": "red"}, {"keywords": [1]}, {"about": 3}])
def test_damaged_keywords_are_refused(folder, tmp_path, values):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(CheckpointError, match="they must be a list of words, and a text"):
        FlexAttnLlavaProcessor.from_pretrained(tmp_path)
