"""The study's images: what is drawn and asked is known, and answers are balanced."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import square_resized
from studies.small.objects import COLORS, SHAPES, VEHICLES, Box, Glyph, Sign, shape_outline, vehicle_outline
from studies.small.painter import SIDE, Painter
from studies.small.photographs import find_photographs, photograph_files
from studies.small.questions import CHANCE, TASKS, sign_questions, vehicle_questions, vocabulary
from studies.small.scenes import SIZES, draw_scene, make_scenes, square_corner


@pytest.fixture(scope="module")
def scenes(photographs):
    return list(make_scenes(photographs, 300, seed=0))


@pytest.mark.slow
def test_scenes_depend_on_seed_and_number_alone(photographs, scenes):
    again = list(make_scenes(photographs, 10, seed=0, first=5))
    for one, other in zip(scenes[5:15], again, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one.without_image() == other.without_image()
    other_seed = next(make_scenes(photographs, 1, seed=1))
    assert other_seed.image.tobytes() != scenes[0].image.tobytes()


def test_tasks_and_sizes_come_in_turn(scenes):
    assert Counter((scene.asked.task, scene.size) for scene in scenes) == {
        (task, size): 30 for task in TASKS for size in SIZES
    }
    assert all(scene.asked in scene.questions for scene in scenes)


def test_images_have_the_side_that_they_are_resampled_from(scenes):
    assert {max(scene.image.size) for scene in scenes} == {SIDE}


def test_boxes_lie_inside_the_image(scenes):
    for scene in scenes:
        left, top = ((SIDE - part) // 2 for part in scene.image.size)
        right, bottom = left + scene.image.width, top + scene.image.height
        for x0, y0, x1, y1 in (box for question in scene.questions for box in question.boxes):
            assert left <= x0 < x1 <= right and top <= y0 < y1 <= bottom


@pytest.mark.parametrize("size", [(257, 384), (384, 193), (256, 384), (384, 384)])
def test_the_square_begins_where_the_preprocessing_pads(size):
    """Checked with one white pixel in an image that is padded to a square."""
    image = Image.new("RGB", size)
    image.putpixel((5, 7), (255, 255, 255))
    left, top = square_corner(image)
    padded = square_resized(image, max(size), (0, 0, 0))
    assert padded.getpixel((5 - left, 7 - top)) == (255, 255, 255)


def test_glyphs_lie_on_their_sign_in_reading_order(scenes):
    for sign in (sign for scene in scenes for sign in scene.signs):
        x0, y0, x1, y1 = sign.box
        for glyph in sign.glyphs:
            left, top, right, bottom = glyph.box
            assert x0 <= left < right <= x1 and y0 <= top < bottom <= y1
        middles = [glyph.box[0] + glyph.box[2] for glyph in sign.glyphs]
        assert middles == sorted(middles)


def test_nothing_drawn_overlaps(scenes):
    for scene in scenes:
        boxes = [thing.box for thing in (*scene.signs, *scene.vehicles)]
        for k, (x0, y0, x1, y1) in enumerate(boxes):
            assert all(x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0 for u0, v0, u1, v1 in boxes[:k])


def test_a_sign_has_its_colour_and_light_glyphs_where_the_boxes_say(scenes):
    """A corner inside the border shows the plate; the middle of a circle, square or cross shows the glyph."""
    seen = 0
    for scene in scenes:
        pad = [(SIDE - part) // 2 for part in scene.image.size]
        for sign in scene.signs:
            plain = scene.image.getpixel((int(sign.box[0]) - pad[0] + 3, int(sign.box[1]) - pad[1] + 3))
            nearest = min(COLORS, key=lambda name: sum(abs(a - b) for a, b in zip(COLORS[name], plain)))
            assert nearest == sign.color
            for glyph in sign.glyphs:
                if glyph.name in ("circle", "square", "cross"):
                    x, y = ((glyph.box[k] + glyph.box[k + 2]) / 2 - pad[k] for k in (0, 1))
                    assert min(scene.image.getpixel((int(x), int(y)))) > 200
                    seen += 1
    assert seen > 100


def test_answers_follow_from_what_is_drawn(scenes):
    for scene in scenes:
        for question in scene.questions:
            words = question.text.lower().strip("?").split()
            if question.task in ("presence", "comparison"):
                assert question.looks == (tuple(vehicle.box for vehicle in scene.vehicles),)
                counts = Counter(vehicle.name for vehicle in scene.vehicles)
                if question.task == "presence":
                    right = counts[words[-1]] > 0
                else:
                    right = counts[words[3].removesuffix("s")] > counts[words[5].removesuffix("s")]
                assert question.answer == ("yes" if right else "no",)
            else:
                (sign,) = (sign for sign in scene.signs if sign.color in words)
                names = tuple(glyph.name for glyph in sign.glyphs)
                looks = tuple((glyph.box,) for glyph in sign.glyphs)
                if question.task == "spatial":
                    assert words[2] == "circle"
                    subject = names.index("circle")
                    assert question.answer == (("left", "right")[subject],) and question.looks == (looks[subject],)
                    assert names[1 - subject] == words[8]
                else:
                    assert question.looks == looks
                    assert question.answer == names and len(names) == (2 if question.task == "text" else 1)


def test_no_two_signs_have_the_same_colour(scenes):
    assert all(len({sign.color for sign in scene.signs}) == len(scene.signs) for scene in scenes)


def test_large_things_are_larger_by_the_factor_of_the_sizes(scenes):
    for kind in ("signs", "vehicles"):
        width = {
            size: np.mean([drawn.box.width for scene in scenes if scene.size == size for drawn in getattr(scene, kind)])
            for size in SIZES
        }
        # Widths vary within a fifth of their mean: the mean of hundreds is within 5 %.
        assert width["large"] / width["small"] == pytest.approx(SIZES["large"] / SIZES["small"], rel=0.05)


@pytest.mark.slow
def test_answers_are_balanced(photographs):
    """Within four standard errors of uniform, in what is asked and in all questions of the training."""
    painter = Painter(photographs, None, random.Random(3))
    painter.background = lambda width, height, shares: Image.new("RGB", (width, height))
    drawn = {task: [draw_scene(painter, task, "small", turn) for turn in range(300)] for task in TASKS}
    possible = {
        "attribute": SHAPES,
        "spatial": ("left", "right"),
        "presence": ("yes", "no"),
        "comparison": ("yes", "no"),
    }
    for task, answers in possible.items():
        for chosen in (
            [scene.asked for scene in drawn[task]],
            [
                random.Random(number).choice([q for q in scene.questions if q.task == task])
                for number, scene in enumerate(drawn[task])
            ],
        ):
            counts = Counter(question.answer for question in chosen)
            p, n = CHANCE[task], len(chosen)
            assert set(counts) == {(answer,) for answer in answers}
            assert p == 1 / len(answers)
            assert max(abs(count - p * n) for count in counts.values()) < 4 * (n * p * (1 - p)) ** 0.5
    digits = Counter(digit for scene in drawn["text"] for digit in scene.asked.answer)
    assert set(digits) == set("0123456789")
    assert max(abs(count - 60) for count in digits.values()) < 4 * (600 * 0.1 * 0.9) ** 0.5


def test_two_answers_are_asked_for_equally_often(scenes):
    for task, size in ((task, size) for task in TASKS for size in SIZES if CHANCE[task] == 1 / 2):
        counts = Counter(scene.asked.answer for scene in scenes if (scene.asked.task, scene.size) == (task, size))
        assert sorted(counts.values()) == [15, 15]


def test_how_many_vehicles_there_are_tells_nothing_about_the_answer():
    """Every fleet asks about each kind alike: renaming the kinds turns one answer into the other."""
    box = Box(0, 0, 1, 1)
    for fleet in (["car", "car", "boat"], ["plane"] * 3 + ["car"] * 2):
        questions = vehicle_questions([Glyph(kind, box) for kind in fleet])
        answers = Counter(question.answer for question in questions if question.task == "comparison")
        assert answers == {("yes",): 1, ("no",): 1}


@pytest.mark.parametrize("names, answer", [(("star", "circle"), "right"), (("circle", "star"), "left")])
def test_a_sign_with_two_shapes_is_asked_where_its_circle_is(names, answer):
    glyphs = tuple(Glyph(name, Box(k, 0, k + 1, 1)) for k, name in enumerate(names))
    (question,) = sign_questions([Sign("red", glyphs, Box(0, 0, 2, 1))])
    assert question.text == "Is the circle left or right of the star on the red sign?"
    assert question.answer == (answer,)
    assert question.boxes == (glyphs[names.index("circle")].box,)


def test_area_and_extent_do_not_tell_vehicles_apart():
    """Equal within 5 %: a blob at low resolution is as bright and as large for each."""
    outlines = [np.array(vehicle_outline(kind)) for kind in VEHICLES]
    areas = [area(corners) for corners in outlines]
    extents = [np.hypot(*corners.T).max() for corners in outlines]
    for values in (areas, extents):
        assert max(values) / min(values) < 1.05


def test_area_does_not_tell_shapes_apart():
    areas = [area(np.array(shape_outline(name))) for name in SHAPES]
    assert max(areas) / min(areas) < 1.1


def area(corners):
    x, y = corners.T
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def test_the_vocabulary_has_every_word(scenes):
    def words(text):
        return text.lower().replace("?", "").split()

    known = {word for text in vocabulary() for word in words(text)} | set("0123456789")
    for question in (question for scene in scenes for question in scene.questions):
        assert {*words(question.text), *question.answer} <= known


def test_held_out_photographs_are_not_trained_on(tmp_path):
    for number in range(9):
        Image.new("RGB", (40, 30), (28 * number, 0, 0)).save(tmp_path / f"{number}.jpg", quality=100)
    shades = [
        {photograph.getpixel((5, 5))[0] // 14 for photograph in find_photographs([tmp_path], held)}
        for held in (False, True)
    ]
    assert len(shades[0]) == 7 and len(shades[1]) == 2
    assert not shades[0] & shades[1]


def test_photographs_are_sorted_by_name_whatever_their_folder_and_ending(tmp_path):
    folder = tmp_path / "desktop" / "photographs"  # parents of the given folder do not matter
    names = ["a.jpg", "b.JPG", "c.jpeg", "d.jpg", "e.JPEG", "f.jpg", "g.Jpg", "h.jpg"]
    for number, name in enumerate(reversed(names)):
        path = folder / str(number % 3) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "abstract").mkdir()
    for name in ("abstract/i.jpg", "j.png", "k.txt"):
        (folder / name).touch()
    assert [path.name for path in photograph_files([folder])] == names


def test_too_few_photographs_are_reported(tmp_path):
    with pytest.raises(InputError, match="found 0 photographs"):
        find_photographs([tmp_path], False)
