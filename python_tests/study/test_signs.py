"""What the default model is trained on: signs are where they are said to be, and every question has its answer."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

from flexattn_cuda.errors import InputError
from studies.default_model import phrases
from studies.default_model.encoder import CLASSES, HALVES, SIZES, SignCrops, token_labels
from studies.default_model.fonts import FONTS, HELD_OUT_FONTS, find_fonts
from studies.default_model.questions import ANSWERS, NONE, PARTS, TASKS, WHICH, sign_question
from studies.default_model.signs import KINDS, Look, SignPainter, as_jpeg, kind_of, photographed, text_of
from studies.small.objects import COLORS, Box, Glyph, Sign
from studies.small.painter import SIDE
from studies.small.small_model import build_image_processor, build_tokenizer

LOOK = Look([None])


def sign(color: str, text: str, left: float, top: float) -> Sign:
    """A sign with a character every ten pixels."""
    glyphs = tuple(Glyph(name, Box(left + 10 * k, top, left + 10 * k + 10, top + 16)) for k, name in enumerate(text))
    return Sign(color, glyphs, Box(left - 4, top - 4, left + 10 * len(text) + 4, top + 20))


RED, BLUE, GREEN = sign("red", "407", 40, 40), sign("blue", "STOP", 300, 60), sign("green", "8", 180, 330)
SIGNS = (RED, BLUE, GREEN)


def asked(task: str, signs=SIGNS, count: int = 60):
    rng = random.Random(task)
    return [question for _ in range(count) if (question := sign_question(task, signs, rng)) is not None]


def colour_of(text: str) -> str:
    (color,) = set(text.split()) & set(COLORS)
    return color


# ---------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("angle", [0.0, -12.0, 12.0])
@pytest.mark.parametrize("side", [288, 1200])
def test_glyphs_are_where_they_are_said_to_be(photographs, angle, side):
    dark = [photographs[0].point(lambda value: value // 4)]
    painter = SignPainter(dark, Look([None], angle=(angle, angle)), random.Random(side))
    drawing = painter.image(side, (1, 1), count=4)
    values = np.asarray(drawing.image.convert("L"))
    assert drawing.signs
    for drawn in drawing.signs:
        assert drawn.box.left >= 0 and drawn.box.top >= 0
        assert drawn.box.right <= side and drawn.box.bottom <= side
        for glyph in drawn.glyphs:
            left, top, right, bottom = (round(edge) for edge in glyph.box)
            assert values[top:bottom, left:right].max() > 200, f"nothing light at {glyph}"


def test_signs_of_an_image_differ_in_colour_and_lie_apart(photographs):
    painter = SignPainter(photographs, LOOK, random.Random(1))
    kinds = Counter()
    for _ in range(60):
        signs = painter.image(384).signs
        assert len({one.color for one in signs}) == len(signs) <= 5
        kinds.update(map(kind_of, signs))
        for k, one in enumerate(signs):
            for other in signs[:k]:
                a, b = one.box, other.box
                assert a.right < b.left or b.right < a.left or a.bottom < b.top or b.bottom < a.top
    assert set(kinds) == set(KINDS)


def test_numbers_have_one_to_three_digits_and_words_two_to_five_letters(photographs):
    painter = SignPainter(photographs, LOOK, random.Random(2))
    texts = ["".join(painter.content()) for _ in range(400)]
    assert {len(text) for text in texts if text.isdigit()} == {1, 2, 3}
    assert {len(text) for text in texts if text.isupper()} == {2, 3, 4, 5}


def test_a_photograph_keeps_its_size(photographs):
    for image in (photographed(photographs[0], random.Random(0)), as_jpeg(photographs[0], 50)):
        assert image.size == photographs[0].size and image.mode == "RGB"


def test_fonts_that_are_missing_are_named(tmp_path):
    with pytest.raises(InputError, match=r"OpenSans-Bold.ttf, .* are not in .*; install the packages"):
        find_fonts([tmp_path], HELD_OUT_FONTS)
    for name in FONTS:
        (tmp_path / name).touch()
    assert [path.name for path in find_fonts([tmp_path], FONTS)] == list(FONTS)
    assert not set(FONTS) & set(HELD_OUT_FONTS)


# ---------------------------------------------------------------------------------------------------------- labels


def test_each_half_of_a_token_is_labelled_with_its_own_glyph():
    narrow = Sign("red", (Glyph("1", Box(8, 8, 12, 16)), Glyph("7", Box(12, 8, 16, 16))), Box(4, 4, 20, 20))
    labels = [label.view(SIZES.lr_side, SIZES.lr_side) for label in token_labels([narrow], True)]
    found = {
        kind: [list(names)[labels[HALVES * number + half][1, 1]] for half in range(HALVES)]
        for number, (kind, names) in enumerate(CLASSES.items())
    }
    assert found == {"colour": ["red", "red"], "glyph": ["1", "7"], "from left": ["0", "1"], "from right": ["1", "0"]}
    assert len(CLASSES["glyph"]) == labels[HALVES][5, 5]  # nothing


def test_a_place_is_unsure_where_the_end_that_it_is_counted_from_is_cut_off():
    labels = token_labels([sign("red", "407", -12, 40)], True)
    by_kind = {kind: torch.stack(labels[HALVES * n : HALVES * n + HALVES]) for n, kind in enumerate(CLASSES)}
    shown = {kind: set(values.unique().tolist()) - {len(CLASSES[kind])} for kind, values in by_kind.items()}
    assert shown["from left"] == {-100} and 0 in shown["from right"]


def test_batches_depend_on_seed_and_step_alone(photographs):
    images = build_image_processor(None, SIZES)
    one, other = (SignCrops(photographs, LOOK, images, "seed", count=3) for _ in range(2))
    assert torch.equal(one[4].pixels, other[4].pixels) and not torch.equal(one[4].pixels, one[5].pixels)
    assert one[4].pixels.shape == (3, 3, SIZES.lowres, SIZES.lowres)
    assert all(label.shape == (3, SIZES.lr_side**2) for label in one[4].labels)


# -------------------------------------------------------------------------------------------------------- questions


def test_what_is_read_is_on_the_sign():
    texts = {one.color: text_of(one) for one in SIGNS}
    for question in asked("read"):
        assert "".join(question.answer) == texts[colour_of(question.text)]
        assert set(question.answer) <= set(ANSWERS) | set("0123456789")


def test_absent_signs_are_said_to_be_absent():
    for question in asked("absent"):
        assert question.answer == (NONE,) and question.boxes == ()
        assert colour_of(question.text) in ("purple", "black")
    every = [sign(color, "1", 50 * k, 50) for k, color in enumerate(COLORS)]
    assert not asked("absent", every)


def test_presence_is_answered_with_yes_and_no():
    answers = {question.answer: colour_of(question.text) for question in asked("presence")}
    assert set(answers) == {("yes",), ("no",)} and answers["no",] in ("purple", "black")


def test_signs_are_counted():
    assert {question.answer for question in asked("count")} == {("3",)}
    assert {question.answer for question in asked("describe", [RED])} == {("1 sign",)}


def test_where_a_sign_is():
    expected = {"red": PARTS[0], "blue": PARTS[1]}  # the green one is between two parts
    assert {colour_of(q.text): q.answer[0] for q in asked("where")} == expected
    assert {q.answer for q in asked("where", [sign("red", "1", SIDE / 2, SIDE / 2)])} == {("in the middle",)}


def test_a_question_that_names_no_sign_is_answered_if_there_is_one_only():
    assert {question.answer for question in asked("colourless")} == {(WHICH,)}
    assert {question.answer for question in asked("colourless", [BLUE])} == {tuple("STOP")}


def test_every_word_and_every_answer_has_a_token():
    tokenizer = build_tokenizer(phrases.vocabulary(), "<image>", "<answer>", answers=ANSWERS)
    for task in TASKS:
        for question in asked(task, count=200):
            assert tokenizer.unk_token_id not in tokenizer(question.text.lower())["input_ids"], question.text
            ids = tokenizer("".join(question.answer), add_special_tokens=False)["input_ids"]
            assert tokenizer.convert_ids_to_tokens(ids) == list(question.answer)
            assert tokenizer.decode(ids) == "".join(question.answer)


# ---------------------------------------------------------------------------------------------------------- phrases


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9{}]+", " ", text.lower()).split()


def test_held_out_phrases_share_no_four_words_in_a_row_with_a_template():
    def runs(text: str) -> set[tuple[str, ...]]:
        one = words(text)
        return {tuple(one[k : k + 4]) for k in range(len(one) - 3)}

    known = set().union(*map(runs, phrases.framed_templates()))
    held_out = phrases.held_out_phrases()
    assert len(set(held_out)) == 40 and len(set(phrases.templates())) >= 200
    assert {phrase: runs(phrase) & known for phrase in held_out} == {phrase: set() for phrase in held_out}


def test_held_out_phrases_have_no_unknown_word():
    known = {word for text in phrases.vocabulary() for word in words(text)}
    assert all(set(words(phrase)) - {"{c}"} <= known for phrase in phrases.held_out_phrases())


def test_keywords_are_words_that_the_model_knows():
    known = {word for text in phrases.vocabulary() for word in words(text)}
    assert set(COLORS) < set(phrases.keywords()) <= known
