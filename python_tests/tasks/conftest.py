"""Fixtures of the tasks: a small checkpoint, images, training data, and the batches that a model is asked."""

from __future__ import annotations

import pytest
import question_files
import tiny_checkpoint
from training_data import write

from flexattn_cuda.tasks import ask as answering


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a small checkpoint, which no test changes."""
    return tiny_checkpoint.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def image(tmp_path):
    question_files.image().save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.fixture
def folder(tmp_path):
    """A folder with images 0.png, 1.png and 2.png of different shapes."""
    for number, size in enumerate([(160, 120), (120, 160), (96, 96)]):
        question_files.image(*size, seed=number).save(tmp_path / f"{number}.png")
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
