"""V* Bench: its files, and the option that wins."""

from __future__ import annotations

import json

import pytest
from documents import ROOT
from evaluation_data import VSTAR

from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation import data
from flexattn_cuda.evaluation import vstar as reader

SCORING = json.loads((ROOT / "python_tests/data/reference_vectors/scoring_training.json").read_text())["scoring"]


def test_questions_are_read_with_their_images(vstar):
    questions = reader.read_questions(vstar)
    found = {category: [] for category in VSTAR}
    for one in questions:
        assert one.image.is_file() and one.image.parent.name == one.category
        found[one.category].append((one.question, one.options))
    assert found == VSTAR


def test_the_prompt_asks_for_a_short_answer():
    asked = "Where is it?\nAnswer the question using a single word or phrase."
    assert reader.prompt({"question": "Where is it?"}) == asked


def test_the_option_with_the_minimum_loss_wins():
    """By the losses of the released implementation, which chooses the option of this number."""
    losses, chosen = SCORING["losses"], SCORING["argmin"]
    for right in range(len(losses)):
        options = [losses[right], *losses[:right], *losses[right + 1 :]]  # the right one comes first in the data
        metrics = reader.accuracies({"category": "relative_position"}, [(loss, False) for loss in options])
        won = float(right == chosen)
        assert metrics == {"vstar_acc": won, "vstar_relative_position_acc": won}


def test_losses_that_came_as_text_are_numbers():
    """As lmms-eval 0.7.3 hands them on; as text, 10 is less than 9."""
    results = [str((10.5, True)), str((9.25, False))]
    assert reader.accuracies({"category": "direct_attributes"}, results)["vstar_acc"] == 0.0
    assert reader.accuracies({"category": "direct_attributes"}, results[::-1])["vstar_acc"] == 1.0


@pytest.mark.parametrize(
    "record, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", 'must have a "question" and at least two "options"'),
        ('{"question": "Why?"}', 'must have a "question" and at least two "options"'),
        ('{"question": "Why?", "options": ["a"]}', 'must have a "question" and at least two "options"'),
        ('{"question": "Why?", "options": ["a", 7]}', "all of them text"),
        ('{"question": " ", "options": ["a", "b"]}', "all of them text"),
    ],
)
def test_a_file_in_another_format_is_refused(vstar, record, message):
    (vstar / "direct_attributes" / "sa_0.json").write_text(record)
    with pytest.raises(InputError, match=message) as refused:
        reader.read_questions(vstar)
    assert "sa_0.json" in str(refused.value)


def test_a_question_without_its_image_is_refused(vstar):
    (vstar / "direct_attributes" / "sa_1.jpg").unlink()
    with pytest.raises(InputError, match=r"sa_1\.json has no image beside it"):
        reader.read_questions(vstar)


def test_a_folder_in_another_format_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no JSON files; V\\* Bench has the folders direct_attributes and"):
        reader.read_questions(tmp_path)


def test_the_data_is_where_the_variable_says(vstar, monkeypatch):
    assert data.dataset_folder(reader.REPOSITORY) == vstar
    monkeypatch.setenv("FLEXATTN_DATA", str(vstar))
    with pytest.raises(InputError, match="there is no folder .*vstar_bench/vstar_bench; FLEXATTN_DATA must name"):
        data.dataset_folder(reader.REPOSITORY)


def test_without_a_network_the_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("FLEXATTN_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="copy it to DIR/no_such_set and set FLEXATTN_DATA=DIR"):
        data.dataset_folder("nobody/no_such_set")
