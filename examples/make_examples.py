"""Draws the example images of `flexattn demo`, larger than those of the training, and the test images of python_tests.

Both are drawn on photographs that the training has not seen. The first and third also ship with the package.

    python examples/make_examples.py --photographs FOLDER --font DejaVuSans-Bold.ttf
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image
from signs import SIDE, SignPainter, digits_of

HERE = Path(__file__).parent
PACKAGED = HERE.parent / "flexattn_cuda" / "assets" / "examples"
TESTS = HERE.parent / "python_tests" / "data" / "held_out"
PIXELS = 1008  # of the longer side
TEST_IMAGES, TEST_SEED = 48, 100


@dataclass(frozen=True)
class Example:
    """An image of the demo: a held-out photograph of lomiri-wallpapers-16.04 (LICENSES), its shape, and the seed."""

    photograph: str
    shape: tuple[float, float]
    seed: int

    @property
    def file(self) -> str:
        """The image's path in this folder."""
        return f"photographs/{self.seed}_{self.photograph.partition('_')[0].lower()}.jpg"


EXAMPLES = (
    Example("picosdeeuropa_by_Aitzol_Berasategi.jpg", (1.0, 0.75), 1),
    Example("Dragonfly_by_Bolly.jpg", (1.0, 1.0), 2),
    Example("free_by_Peter_Nerlich.jpg", (0.75, 1.0), 3),
    Example("picosdeeuropa_by_Aitzol_Berasategi.jpg", (1.0, 1.0), 4),
)


@dataclass(frozen=True)
class AskedImage:
    """An entry of questions.json: an image's path, a question, its answer, and the sign's box in pixels."""

    file: str
    question: str
    answer: str
    box: tuple[float, float, float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of lomiri-wallpapers-16.04")
    parser.add_argument("--font", type=Path, required=True, help="DejaVuSans-Bold.ttf")
    options = parser.parse_args()
    examples = draw_examples(options.photographs, options.font)
    write_questions(HERE, examples)
    write_packaged([examples[0], examples[2]])
    write_questions(TESTS, draw_tests(options.photographs, options.font))


def draw_examples(photographs: Path, font: Path) -> list[AskedImage]:
    """Write the demo's images, and return the question about the first sign of each."""
    (HERE / "photographs").mkdir(exist_ok=True)
    asked = []
    for example in EXAMPLES:
        painter = SignPainter([open_rgb(photographs / example.photograph)], font, random.Random(example.seed))
        drawing = painter.image(PIXELS, PIXELS / SIDE, example.shape)
        drawing.image.save(HERE / example.file, quality=92)
        sign = drawing.signs[0]
        asked.append(AskedImage(example.file, painter.question(sign.color), digits_of(sign), sign.box))
    return asked


def write_packaged(examples: list[AskedImage]) -> None:
    """Write the examples that `flexattn demo` asks outside of the repository."""
    for example in examples:
        shutil.copy(HERE / example.file, PACKAGED)
    write_questions(PACKAGED, [replace(example, file=Path(example.file).name) for example in examples])


def draw_tests(photographs: Path, font: Path) -> list[AskedImage]:
    """Write the test images, and return a question about a random sign of each."""
    TESTS.mkdir(parents=True, exist_ok=True)
    names = sorted({example.photograph for example in EXAMPLES})
    painter = SignPainter([open_rgb(photographs / name) for name in names], font, random.Random(TEST_SEED))
    asked = []
    for number in range(TEST_IMAGES):
        file, question = f"{number:02d}.jpg", painter.ask_about_any_sign()
        question.image.save(TESTS / file, quality=95)
        asked.append(AskedImage(file, question.text, digits_of(question.sign), question.sign.box))
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
