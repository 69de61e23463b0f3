"""Fixtures of the tasks: a small checkpoint, images, training data, and the batches that a model is asked."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_checkpoint
from PIL import Image
from training_data import write

from flexattn_cuda.tasks import ask as answering


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a small checkpoint, which no test changes."""
    return tiny_checkpoint.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def image(tmp_path):
    values = np.random.default_rng(3).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    Image.fromarray(values).resize((160, 120)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.fixture
def folder(tmp_path):
    """A folder with images 0.png, 1.png and 2.png of different shapes."""
    random = np.random.default_rng(5)
    for number, (width, height) in enumerate([(20, 15), (15, 20), (12, 12)]):
        values = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).resize((8 * width, 8 * height)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """The batches of questions that the model was asked."""
    batches, generate = [], answering.generate_answers

    def recorded(model, processor, images, questions, *rest):
        batches.append(questions)
        return generate(model, processor, images, questions, *rest)

    monkeypatch.setattr(answering, "generate_answers", recorded)
    return batches


@pytest.fixture
def files(tmp_path):
    """(data, images)"""
    return write(tmp_path)
