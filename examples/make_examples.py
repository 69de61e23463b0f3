"""Draws the example images of `flexattn demo`, larger than those of the training, and the test images of python_tests.

Both are drawn on photographs that the training has not seen. The first and third also ship with the package.

    python -m examples.make_examples --photographs FOLDER --fonts FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

from studies.default_model.evaluation import WORDS
from studies.default_model.fonts import FONTS, find_fonts
from studies.default_model.signs import Look, SignPainter, kind_of, text_of
from studies.small.objects import Sign

HERE = Path(__file__).parent
PACKAGED = HERE.parent / "flexattn_cuda" / "assets" / "examples"
TESTS = HERE.parent / "python_tests" / "data" / "held_out"
PIXELS, TEST_PIXELS = 1008, 384  # of the longer side
TEST_IMAGES, TEST_SEED = 48, 100
QUESTIONS = {
    "number": "What number is on the {} sign?",
    "word": "What does the {} sign say?",
    "shape": "Which shape is on the {} sign?",
}


@dataclass(frozen=True)
class Example:
    """An image of the demo: a held-out photograph of lomiri-wallpapers-16.04 (LICENSES), its shape, the seed, the sign.

    Attributes:
        kind: What the sign shows that is asked about, a key of QUESTIONS.
    """

    photograph: str
    shape: tuple[float, float]
    seed: int
    kind: str

    @property
    def file(self) -> str:
        """The image's path in this folder."""
        return f"photographs/{self.seed}_{self.photograph.partition('_')[0].lower()}.jpg"


EXAMPLES = (
    Example("picosdeeuropa_by_Aitzol_Berasategi.jpg", (1.0, 0.75), 1, "number"),
    Example("Dragonfly_by_Bolly.jpg", (1.0, 1.0), 2, "shape"),
    Example("free_by_Peter_Nerlich.jpg", (0.75, 1.0), 3, "word"),
    Example("picosdeeuropa_by_Aitzol_Berasategi.jpg", (1.0, 1.0), 4, "number"),
)


@dataclass(frozen=True)
class AskedImage:
    """An entry of questions.json: an image's path, a question, its answer, and the sign's box in pixels."""

    file: str
    question: str
    answer: str
    box: tuple[float, float, float, float]

    @classmethod
    def about(cls, file: str, sign: Sign) -> AskedImage:
        """Return the question about what a sign shows."""
        question = QUESTIONS[kind_of(sign)].format(sign.color)
        return cls(file, question, text_of(sign), tuple(round(edge) for edge in sign.box))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of lomiri-wallpapers-16.04")
    parser.add_argument("--fonts", type=Path, required=True, help="folder of the fonts that the training uses")
    options = parser.parse_args()
    look = Look(find_fonts([options.fonts], FONTS), scale=(0.9, 1.2), angle=(-6, 6), words=WORDS)
    examples = draw_examples(options.photographs, look)
    write_questions(HERE, examples)
    write_packaged([examples[0], examples[2]])
    write_questions(TESTS, draw_tests(options.photographs, look))


def draw_examples(photographs: Path, look: Look) -> list[AskedImage]:
    """Write the demo's images, and return a question about a sign of each."""
    (HERE / "photographs").mkdir(exist_ok=True)
    asked = []
    for example in EXAMPLES:
        painter = SignPainter([open_rgb(photographs / example.photograph)], look, random.Random(example.seed))
        signs: list[Sign] = []
        while not any(kind_of(sign) == example.kind for sign in signs):
            drawing = painter.image(PIXELS, example.shape, count=4)
            signs = drawing.signs
        drawing.image.save(HERE / example.file, quality=92)
        asked.append(AskedImage.about(example.file, next(sign for sign in signs if kind_of(sign) == example.kind)))
    return asked


def write_packaged(examples: list[AskedImage]) -> None:
    """Write the examples that `flexattn demo` asks outside of the repository."""
    for example in examples:
        shutil.copy(HERE / example.file, PACKAGED)
    write_questions(PACKAGED, [replace(example, file=Path(example.file).name) for example in examples])


def draw_tests(photographs: Path, look: Look) -> list[AskedImage]:
    """Write the test images, and return a question about a random sign of each."""
    TESTS.mkdir(parents=True, exist_ok=True)
    names = sorted({example.photograph for example in EXAMPLES})
    painter = SignPainter([open_rgb(photographs / name) for name in names], look, random.Random(TEST_SEED))
    asked = []
    for number in range(TEST_IMAGES):
        file, drawing = f"{number:02d}.jpg", painter.image(TEST_PIXELS, count=3)
        drawing.image.save(TESTS / file, quality=92)
        asked.append(AskedImage.about(file, painter.rng.choice(drawing.signs)))
    return asked


def open_rgb(path: Path) -> Image.Image:
    """Return a photograph in RGB."""
    return Image.open(path).convert("RGB")


def write_questions(folder: Path, asked: list[AskedImage]) -> None:
    """Write questions.json, a line for each image."""
    lines = ",\n".join("  " + json.dumps(asdict(one)) for one in asked)
    (folder / "questions.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
