"""Draws the example images of `flexattn demo`, larger than those of the training, and the test images of python_tests.

Both stand on photographs that the training has not seen.

    python examples/make_examples.py --photographs FOLDER --font DejaVuSans-Bold.ttf
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image
from signs import SIDE, Painter, digits_of

HERE = Path(__file__).parent
PIXELS = 1008  # of the longer side
TEST_IMAGES, TEST_SEED = 48, 100
# Held-out photographs of lomiri-wallpapers-16.04 (LICENSES), shape of the image, seed.
IMAGES = (
    ("picosdeeuropa_by_Aitzol_Berasategi.jpg", (1.0, 0.75), 1),
    ("Dragonfly_by_Bolly.jpg", (1.0, 1.0), 2),
    ("free_by_Peter_Nerlich.jpg", (0.75, 1.0), 3),
    ("picosdeeuropa_by_Aitzol_Berasategi.jpg", (1.0, 1.0), 4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--font", type=Path, required=True)
    options = parser.parse_args()
    (HERE / "photographs").mkdir(exist_ok=True)
    questions = []
    for name, shape, seed in IMAGES:
        photograph = Image.open(options.photographs / name).convert("RGB")
        painter = Painter([photograph], options.font, random.Random(seed))
        image, signs = painter.image(PIXELS, scale=PIXELS / SIDE, shape=shape)
        file = f"photographs/{seed}_{name.partition('_')[0].lower()}.jpg"
        image.save(HERE / file, quality=92)
        sign = signs[0]
        questions.append(
            {
                "file": file,
                "question": painter.question(sign.color),
                "answer": digits_of(sign),
                "box": list(sign.box),
            }
        )
    write_questions(HERE, questions)

    tests = HERE.parent / "python_tests" / "data" / "held_out"
    tests.mkdir(parents=True, exist_ok=True)
    photographs = [
        Image.open(options.photographs / name).convert("RGB") for name in sorted({name for name, _, _ in IMAGES})
    ]
    painter = Painter(photographs, options.font, random.Random(TEST_SEED))
    questions = []
    for number in range(TEST_IMAGES):
        image, signs = painter.image()
        sign = painter.rng.choice(signs)
        image.save(tests / f"{number:02d}.jpg", quality=95)
        question, answer = painter.question(sign.color), digits_of(sign)
        questions.append({"file": f"{number:02d}.jpg", "question": question, "answer": answer, "box": sign.box})
    write_questions(tests, questions)


def write_questions(folder: Path, questions: list[dict]) -> None:
    lines = ",\n".join("  " + json.dumps(question) for question in questions)
    (folder / "questions.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
