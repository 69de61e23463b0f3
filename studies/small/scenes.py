"""High-resolution images with questions and known answers: the benchmark that needs no download.

Photographs are the backgrounds. What a question about small objects asks for is too fine for the low-resolution image, but
where it is can be seen there, as in V* Bench: a sign by its colour, the objects of an aerial scene as blobs. Large objects the
low-resolution image shows.

    task        question                                                answer          in the spirit of
    attribute   What shape is on the red sign?                          star            V* Bench, attribute
    spatial     Is the circle left or right of the star on the red sign? left            V* Bench, spatial relation
    text        What number is on the red sign?                         4 7             TextVQA, MagnifierBench
    presence    Is there a boat?                                        yes             RSVQA-HRBEN, presence
    comparison  Are there more boats than cars?                         no              RSVQA-HRBEN, comparison
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from flexattn_cuda.errors import InputError

Box = tuple[float, float, float, float]

TASKS = ("attribute", "spatial", "text", "presence", "comparison")
CHANCE = {
    "attribute": 1 / 5,
    "spatial": 1 / 2,
    "text": 1 / 100,
    "presence": 1 / 2,
    "comparison": 1 / 2,
}
"""Share of right answers of a guess that knows the task's answers but has not seen the image."""
COLORS = {
    "red": (200, 30, 40),
    "green": (25, 130, 55),
    "blue": (35, 75, 205),
    "purple": (140, 50, 170),
    "black": (20, 20, 24),
}
SHAPES = ("star", "circle", "triangle", "square", "cross")
VEHICLES = ("car", "boat", "plane")
SIZES = {"small": 1.0, "large": 2.25}
"""Large objects have in an image of 128 pixels as many pixels as small ones in one of 288."""
SIDE = 384  # pixels of the longer side of an image: zoom 2, 3 and 4 of a 96 pixel one are resampled from it
REFERENCE_SIDE = 288  # pixels of the longer side for which the sizes below are given
ASPECTS = (
    (1.0, 1.0),
    (1.0, 1.0),
    (1.0, 0.75),
    (0.75, 1.0),
    (1.0, 0.67),
)  # width and height over the longer side
FONT_PIXELS = (12.0, 14.5)
VEHICLE_PIXELS = (11.0, 13.0)  # length
_LIGHT, _BORDER = (250, 250, 250), (245, 245, 245)
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Glyph:
    """A digit, a shape or a vehicle's kind, with its box: left, top, right, bottom in pixels."""

    name: str
    box: Box

    def moved(self, left: float, top: float, scale: float = 1.0) -> Glyph:
        """The glyph in a part of the image that begins at (left, top), scaled."""
        return Glyph(self.name, _moved(self.box, left, top, scale))


@dataclass(frozen=True)
class Sign:
    """A coloured plate with two digits, one shape or two shapes."""

    color: str
    glyphs: tuple[Glyph, ...]
    box: Box

    def moved(self, left: float, top: float, scale: float = 1.0) -> Sign:
        return Sign(
            self.color,
            tuple(glyph.moved(left, top, scale) for glyph in self.glyphs),
            _moved(self.box, left, top, scale),
        )


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        task: One of TASKS.
        answer: Its words, one token each.
        looks: For each of them, the boxes that have to be looked at, in pixels of the padded square.
    """

    task: str
    text: str
    answer: tuple[str, ...]
    looks: tuple[tuple[Box, ...], ...]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """All that has to be looked at."""
        return tuple(dict.fromkeys(box for boxes in self.looks for box in boxes))


@dataclass(frozen=True)
class Scene:
    """An image with everything that can be asked about it.

    Attributes:
        image: RGB; None where only its image tokens are kept.
        size: "small" or "large".
        signs, vehicles: What is drawn, with boxes in pixels of the image padded to a square of SIDE.
        asked: The question of the evaluation.
        questions: All, `asked` among them. Uniform over the questions of a task is uniform over its answers.
    """

    image: Image.Image | None
    size: str
    asked: Question
    questions: tuple[Question, ...]
    signs: tuple[Sign, ...] = field(default=())
    vehicles: tuple[Glyph, ...] = field(default=())

    def without_image(self) -> Scene:
        return replace(self, image=None)


def photograph_files(folders: Sequence[Path]) -> list[Path]:
    """The JPEG files in the folders and those inside them, by name.

    Raises:
        InputError: Fewer than 8 files.
    """
    # Several sizes of one drawing in Debian's mate-backgrounds, not photographs.
    left_out = {"abstract", "desktop"}
    paths = [
        path
        for folder in map(Path, folders)
        for path in folder.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg") and left_out.isdisjoint(path.relative_to(folder).parts)
    ]
    if len(paths) < 8:
        raise InputError(
            f"found {len(paths)} photographs (*.jpg, *.jpeg) in {', '.join(map(str, folders))}; at least 8 are needed"
        )
    return sorted(paths, key=lambda path: path.name)


def find_photographs(folders: Sequence[Path], held_out: bool, longest: int = 1100) -> list[Image.Image]:
    """Every fourth of `photograph_files` when `held_out`, else the others, with sides of up to `longest` pixels.

    Raises:
        InputError: Fewer than 8 photographs, or one that cannot be read.
    """
    paths = photograph_files(folders)
    return [_photograph(path, longest) for number, path in enumerate(paths) if (number % 4 == 3) == held_out]


def _photograph(path: Path, longest: int) -> Image.Image:
    try:
        with Image.open(path) as photograph:
            photograph.draft("RGB", (longest, longest))
            photograph = photograph.convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        raise InputError(f"the photograph {path} is damaged or cannot be read: {error}") from None
    photograph.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return photograph


def make_scenes(
    photographs: list[Image.Image],
    count: int,
    seed: int,
    tasks: Sequence[str] = TASKS,
    sizes: Sequence[str] = tuple(SIZES),
    font: Path | None = None,
    first: int = 0,
) -> Iterator[Scene]:
    """Scenes `first` to `first + count` of a seed: the tasks in turn, the sizes in turn after each round of tasks, and the
    two answers of a task that has two in turn after each round of sizes.

    Every scene depends on the seed and its number alone.

    Args:
        font: A TrueType file for the digits; None takes the one inside Pillow.
    """
    for number in range(first, first + count):
        painter = Painter(photographs, font, random.Random(f"{seed} {number}"))
        rounds, task = divmod(number, len(tasks))
        turn, size = divmod(rounds, len(sizes))
        yield painter.scene(tasks[task], sizes[size], turn)


def vocabulary() -> list[str]:
    """Texts with every word of the questions and answers."""
    signs = [Sign(color, tuple(Glyph(name, (0, 0, 1, 1)) for name in names), (0, 0, 1, 1))
             for color in COLORS for names in (("0", "0"), *zip(SHAPES), ("circle", "star"), ("star", "circle"))]  # fmt: skip
    fleets = [
        [Glyph(kind, (0, 0, 1, 1)) for kind in (one, one, other)]
        for one in VEHICLES
        for other in VEHICLES
        if one != other
    ]
    questions = [
        *sign_questions(signs),
        *(question for fleet in fleets for question in vehicle_questions(fleet)),
    ]
    return [text for question in questions for text in (question.text, *question.answer)]


def square_corner(image: Image.Image) -> tuple[int, int]:
    """Left and top of the square that the preprocessing pads an image to, in the image's pixels."""
    side = max(image.size)
    return tuple(-((side - own) // 2) for own in image.size)


class Painter:
    """Draws images; everything random comes from `rng`."""

    def __init__(self, photographs: list[Image.Image], font: Path | None, rng: random.Random):
        self.photographs, self.rng = photographs, rng
        self._font_file, self._fonts = font, {}

    def scene(self, task: str, size: str, turn: int = 0) -> Scene:
        """An image for a question of the task; where an image has questions with two answers, `turn` chooses one of these."""
        rng = self.rng
        aspect = rng.choice(ASPECTS)
        width, height = (round(SIDE * part) for part in aspect)
        scale = SIZES[size] * SIDE / REFERENCE_SIDE
        signs, vehicles = [], []
        if task in ("presence", "comparison"):
            image = self.ground(width, height)
            for kind in self._fleet(task):
                self.add_vehicle(image, kind, vehicles, scale)
        else:
            image = self.background(width, height, (0.45, 1.0))
            asked_for = [task] + [rng.choice(TASKS[:3]) for _ in range(rng.choice((2, 3)))]
            turns = [turn] + [rng.randrange(2) for _ in asked_for[1:]]
            for color, *content in zip(rng.sample(list(COLORS), len(asked_for)), asked_for, turns):
                self.add_sign(image, color, lambda: self.content(*content), signs, scale)
        corner = square_corner(image)
        signs, vehicles = (tuple(part.moved(*corner) for part in parts) for parts in (signs, vehicles))
        questions = (*sign_questions(signs), *vehicle_questions(vehicles))
        of_task = [question for question in questions if question.task == task]
        if CHANCE[task] == 1 / 2:
            answers = sorted({question.answer for question in of_task})
            of_task = [question for question in of_task if question.answer == answers[turn % len(answers)]]
        asked = rng.choice(of_task)
        return Scene(image, size, asked, questions, signs, vehicles)

    def content(self, task: str, turn: int) -> tuple[str, ...]:
        """What is on a sign that a question of the task can be asked about. Of two shapes one is a circle, by turns the left one."""
        if task == "text":
            return tuple(self.rng.choices("0123456789", k=2))
        if task == "attribute":
            return (self.rng.choice(SHAPES),)
        other = self.rng.choice([shape for shape in SHAPES if shape != "circle"])
        return ("circle", other) if turn % 2 == 0 else (other, "circle")

    def _fleet(self, task: str) -> list[str]:
        """Vehicles of one or two kinds, equally often, so that each kind is there in half of the images.

        A comparison needs two kinds, unequally many.
        """
        kinds = self.rng.sample(VEHICLES, 2)
        if task == "comparison":
            counts = self.rng.choice(((2, 1), (3, 1), (3, 2)))
        elif self.rng.random() < 0.5:
            counts = self.rng.choice(((2, 1), (3, 1), (3, 2), (1, 1), (2, 2)))
        else:
            counts = (self.rng.randint(2, 5), 0)
        return [kind for kind, count in zip(kinds, counts) for _ in range(count)]

    def background(self, width: int, height: int, shares: tuple[float, float]) -> Image.Image:
        """A part of a photograph, as wide or high as a share of it between two bounds."""
        photograph = self.rng.choice(self.photographs)
        share = self.rng.uniform(*shares)
        w = min(photograph.width * share, photograph.height * share * width / height)
        h = w * height / width
        left, top = (
            self.rng.uniform(0, photograph.width - w),
            self.rng.uniform(0, photograph.height - h),
        )
        part = photograph.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.rng.random() < 0.5 else part

    def ground(self, width: int, height: int) -> Image.Image:
        """A photograph as ground seen from above: blurred, and dark enough for the vehicles to be seen on it."""
        blurred = self.background(width, height, (0.45, 1.0)).filter(ImageFilter.GaussianBlur(SIDE / 48))
        return Image.blend(blurred, Image.new("RGB", blurred.size, (50, 60, 55)), 0.5)

    def place(self, image: Image.Image, width: int, height: int, drawn: list, gap: float) -> tuple[int, int] | None:
        """The left top corner, uniform over the image, of a box that keeps `gap` pixels from all drawn; None where there is no room."""
        left, top = (
            self.rng.randint(1, all_ - part - 1) for all_, part in ((image.width, width), (image.height, height))
        )
        clear = all(
            left + width + gap < x0 or x1 + gap < left or top + height + gap < y0 or y1 + gap < top
            for x0, y0, x1, y1 in (other.box for other in drawn)
        )
        return (left, top) if clear else None

    def add_sign(
        self,
        image: Image.Image,
        color: str,
        content: Callable[[], Sequence[str]],
        drawn: list[Sign],
        scale: float,
    ) -> None:
        """Somewhere uniformly, but not over another sign; not at all where no room is found. `content` is drawn last."""
        for _ in range(50):
            size = self.rng.uniform(*FONT_PIXELS) * scale
            width, height = (round(size * part + self.rng.uniform(4, 8) * scale) for part in (1.95, 1.25))
            at = self.place(image, width, height, drawn, 4 * scale)
            if at:
                break
        else:
            return
        plate, glyphs = self.sign(color, content(), width, height, size)
        image.paste(plate, at)
        drawn.append(
            Sign(
                color,
                tuple(glyph.moved(-at[0], -at[1]) for glyph in glyphs),
                (*at, at[0] + width, at[1] + height),
            )
        )

    def sign(
        self, color: str, content: Sequence[str], width: int, height: int, size: float
    ) -> tuple[Image.Image, list[Glyph]]:
        """A plate with digits of a font of `size` pixels, or with shapes as high as those."""
        factor = _OVERSAMPLING
        fill = tuple(int(min(255, max(0, part + self.rng.uniform(-14, 14)))) for part in COLORS[color])
        plate = Image.new("RGB", (width * factor, height * factor), fill)
        draw = ImageDraw.Draw(plate)
        draw.rectangle((0, 0, plate.width - 1, plate.height - 1), outline=_BORDER, width=2 * factor)
        if content[0].isdigit():
            text, font = "".join(content), self._font(round(size * factor))
            left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
            x, y = (plate.width - right - left) / 2, (plate.height - bottom - top) / 2
            draw.text((x, y), text, font=font, fill=_LIGHT)
            edges = [x + left + (right - left) * k / len(content) for k in range(len(content) + 1)]
            boxes = [(x0, y + top, x1, y + bottom) for x0, x1 in zip(edges, edges[1:])]
        else:
            half = 0.38 * size * factor  # half the height of a digit
            middle = [plate.width / 2 + (k - (len(content) - 1) / 2) * 2.2 * half for k in range(len(content))]
            boxes = [(x - half, plate.height / 2 - half, x + half, plate.height / 2 + half) for x in middle]
            for name, x in zip(content, middle):
                draw.polygon(
                    [(x + half * u, plate.height / 2 + half * v) for u, v in shape_outline(name)],
                    fill=_LIGHT,
                )
        glyphs = [Glyph(name, tuple(v / factor for v in box)) for name, box in zip(content, boxes)]
        return plate.resize((width, height), Image.Resampling.BOX), glyphs

    def add_vehicle(self, image: Image.Image, kind: str, drawn: list[Glyph], scale: float) -> None:
        """Somewhere uniformly, turned anyhow, but not over another vehicle; not at all where no room is found."""
        for _ in range(200):
            length = self.rng.uniform(*VEHICLE_PIXELS) * scale
            side = math.ceil(length)
            at = self.place(image, side, side, drawn, 2 * scale)
            if at:
                break
        else:
            return
        angle = self.rng.uniform(0, 2 * math.pi)
        light = self.rng.randint(225, 250)
        cover = Image.new("L", (side * _OVERSAMPLING,) * 2)
        half = length * _OVERSAMPLING / 2
        cos, sin, middle = half * math.cos(angle), half * math.sin(angle), cover.width / 2
        turned = [(middle + u * cos - v * sin, middle + u * sin + v * cos) for u, v in vehicle_outline(kind)]
        ImageDraw.Draw(cover).polygon(turned, fill=255)
        image.paste((light, light, light), at, cover.resize((side, side), Image.Resampling.BOX))
        drawn.append(Glyph(kind, (*at, at[0] + side, at[1] + side)))

    def _font(self, size: int) -> ImageFont.FreeTypeFont:
        if size not in self._fonts:
            file = self._font_file
            self._fonts[size] = ImageFont.truetype(str(file), size) if file else ImageFont.load_default(size)
        return self._fonts[size]


def sign_questions(signs: Sequence[Sign]) -> Iterator[Question]:
    """The boxes are those of what is on a sign, not of the plate, most of which is plain."""
    for sign in signs:
        names, looks = (
            tuple(glyph.name for glyph in sign.glyphs),
            tuple((glyph.box,) for glyph in sign.glyphs),
        )
        if names[0].isdigit():
            yield Question("text", f"What number is on the {sign.color} sign?", names, looks)
        elif len(names) == 1:
            yield Question("attribute", f"What shape is on the {sign.color} sign?", names, looks)
        else:
            circle = names.index("circle")
            text = f"Is the circle left or right of the {names[1 - circle]} on the {sign.color} sign?"
            yield Question("spatial", text, (("left", "right")[circle],), (looks[circle],))


def vehicle_questions(vehicles: Sequence[Glyph]) -> Iterator[Question]:
    if not vehicles:
        return
    boxes = tuple(vehicle.box for vehicle in vehicles)
    counts = {kind: sum(vehicle.name == kind for vehicle in vehicles) for kind in VEHICLES}
    for kind, count in counts.items():
        yield Question("presence", f"Is there a {kind}?", ("yes" if count else "no",), (boxes,))
    for one, other in ((one, other) for one in VEHICLES for other in VEHICLES):
        if counts[one] and counts[other] and counts[one] != counts[other]:
            answer = "yes" if counts[one] > counts[other] else "no"
            yield Question("comparison", f"Are there more {one}s than {other}s?", (answer,), (boxes,))


def shape_outline(name: str) -> list[tuple[float, float]]:
    """Corners within [-1, 1] x [-1, 1], y down; of about the same area."""
    if name == "circle":
        return _ring(24, 0.74)
    if name == "square":
        return [(-0.65, -0.65), (0.65, -0.65), (0.65, 0.65), (-0.65, 0.65)]
    if name == "triangle":
        return [(0, -0.95), (0.93, 0.88), (-0.93, 0.88)]
    if name == "cross":
        arm = 0.25
        quarter = [(arm, -1), (arm, -arm), (1, -arm)]
        return [corner for turn in range(4) for corner in (_turned(*point, turn) for point in quarter)]
    corners = [(k * math.pi / 5, 0.56 if k % 2 else 1.0) for k in range(10)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle, radius in corners]


def vehicle_outline(name: str) -> list[tuple[float, float]]:
    """Corners within the unit circle, of about the same area: a box, a pointed hull, a fuselage with wings."""
    if name == "car":
        return [(-0.89, -0.45), (0.89, -0.45), (0.89, 0.45), (-0.89, 0.45)]
    if name == "boat":
        return [(-1.0, 0.0), (-0.3, -0.62), (0.3, -0.62), (1.0, 0.0), (0.3, 0.62), (-0.3, 0.62)]
    half = [
        (1.0, -0.14),
        (0.4, -0.2),
        (0.12, -0.97),
        (-0.24, -0.97),
        (-0.2, -0.2),
        (-0.65, -0.17),
        (-0.7, -0.52),
        (-0.88, -0.47),
    ]
    return half + [(u, -v) for u, v in reversed(half)]


def _ring(corners: int, radius: float) -> list[tuple[float, float]]:
    return [
        (radius * math.cos(2 * math.pi * k / corners), radius * math.sin(2 * math.pi * k / corners))
        for k in range(corners)
    ]


def _turned(u: float, v: float, quarters: int) -> tuple[float, float]:
    for _ in range(quarters):
        u, v = -v, u
    return u, v


def _moved(box: Box, left: float, top: float, scale: float) -> Box:
    return tuple((v - o) * scale for v, o in zip(box, (left, top) * 2))
