"""`flexattn tune`."""

from __future__ import annotations

import json
import re

import pytest
from attached_checkpoint import CHECKPOINTS
from PIL import Image
from refusals import refused

import flexattn_cuda


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return CHECKPOINTS["internvl_qwen2"].save(tmp_path_factory.mktemp("internvl"))


@pytest.fixture
def questions(tmp_path):
    image = Image.new("RGB", (96, 64))
    image.paste((255, 255, 255), (24, 16, 48, 32))
    image.save(tmp_path / "image.png")
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"image": "image.png", "question": "what is this", "box": [24, 16, 48, 32]}) + "\n")
    return path


def test_it_writes_an_adapter_and_prints_the_score_of_every_layer(checkpoint, questions, tmp_path, flexattn):
    code, out, err = flexattn("tune", questions, "--model", checkpoint, "--out", tmp_path / "tuned")
    assert code == 0, err
    assert "area under ROC curve" in out and "attend to high-resolution tokens" in out
    assert len([line for line in out.splitlines() if line.strip()[:1].isdigit()]) == 4  # of five layers but the last
    model, _ = flexattn_cuda.load(checkpoint, device="cpu", adapter=tmp_path / "tuned")
    assert f"layers from {model.flexattn_settings.first_layer} on" in out


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "0 of 0 examples have a box; pass at least one"),
        ("[]", 'line 1 of .* is not an object with "image", "question" and perhaps "box"'),
        ('{"image": "image.png"}', "line 1 of .* is not an object .*: 'question'"),
        ('{"image": "image.png", "question": "what is this", "box": [1, 2]}', "a box is .left, top, right, bottom."),
        ('{"image": "none.png", "question": "what is this"}', "none.png"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(checkpoint, questions, tmp_path, flexattn, content, says):
    questions.write_text(content)
    sentence = refused(flexattn("tune", questions, "--model", checkpoint, "--out", tmp_path / "tuned"))
    assert re.search(says, sentence), sentence
