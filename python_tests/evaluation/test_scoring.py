"""The score of an answer is its cross-entropy, alone and in a batch."""

from __future__ import annotations

import attached_checkpoint
import pytest
import torch
from question_files import QUESTION, image
from torch.nn import functional

from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation.scoring import Candidate, score
from flexattn_cuda.evaluation.scoring import _scores as scores_of
from flexattn_cuda.tasks.load import load
from flexattn_cuda.tasks.training_data import IGNORED

# Answers of several lengths, in words that all tokenizers of the tests have.
CANDIDATES = [
    Candidate([image()], QUESTION, "this is w20"),
    Candidate([image()], QUESTION, "w9"),
    Candidate([image(96, 160, seed=5)], "And on the blue one, which is far away?", "w30 is w31 is w32 is w33"),
]


@pytest.fixture(scope="module", params=["flexattn", "paper", "llava", "hd", "xattn", "attached"])
def loaded(request, checkpoint, tmp_path_factory):
    """This package's LLaVA as each system, and a model that FlexAttention is attached to, in float64."""
    if request.param == "attached":
        folder = attached_checkpoint.CHECKPOINTS["llava_next"].save(tmp_path_factory.mktemp("attached"))
        return load(folder, device="cpu", dtype="float64")
    system = {"flexattn": None, "paper": "flexattn-paper"}.get(request.param, request.param)
    return load(checkpoint, device="cpu", dtype="float64", system=system)


@torch.no_grad()
def by_hand(model, processor, candidate: Candidate) -> tuple[float, bool]:
    """Return the cross-entropy of an answer, token by token, and whether each is the most probable one."""
    question, answer = (
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", candidate.question), ("assistant", candidate.answer))
    )
    question["content"].insert(0, {"type": "image"})
    asked = processor.conversation_text([question], True)
    text = processor.conversation_text([question, answer])
    if not text.startswith(asked):  # a chat template that renders questions alone
        text = f"{asked} {candidate.answer}{processor.tokenizer.eos_token}"
    prompt, whole = (processor(images=list(candidate.images), text=one) for one in (asked, text))
    first, labels = prompt["input_ids"].shape[1], whole["input_ids"].clone()
    labels[:, :first] = -100
    logits = model(**whole, labels=labels, use_cache=False).logits[0].double()
    tokens = whole["input_ids"][0].tolist()
    total, greedy = 0.0, True
    for position in range(first, len(tokens)):
        row = logits[position - 1]
        total += (row.exp().sum().log() - row[tokens[position]]).item()
        greedy = greedy and int(row.argmax()) == tokens[position]
    return total / (len(tokens) - first), greedy


@pytest.mark.slow
def test_a_score_is_the_cross_entropy_of_the_answer(loaded):
    for candidate in CANDIDATES:
        [found] = score(*loaded, [candidate])
        loss, greedy = by_hand(*loaded, candidate)
        assert found.loss == pytest.approx(loss, abs=1e-5) and found.greedy == greedy


@pytest.mark.slow
def test_answers_score_the_same_in_a_batch(loaded):
    alone = [score(*loaded, [candidate])[0] for candidate in CANDIDATES]
    for found, expected in zip(score(*loaded, CANDIDATES), alone, strict=True):
        assert found.loss == pytest.approx(expected.loss, abs=1e-5) and found.greedy == expected.greedy


def test_an_answer_to_no_image_and_one_to_two_images_are_scored_together(checkpoint):
    model, processor = load(checkpoint, device="cpu", dtype="float64")
    mixed = [Candidate([], "Why?", "as a row"), Candidate([image(), image(96, 160)], QUESTION, "7"), CANDIDATES[0]]
    alone = [score(model, processor, [candidate])[0].loss for candidate in mixed]
    assert [found.loss for found in score(model, processor, mixed)] == pytest.approx(alone, abs=1e-5)


def test_an_answer_is_greedy_if_each_of_its_tokens_is_the_most_probable_one():
    labels = torch.tensor([[IGNORED, 2, 1, IGNORED], [IGNORED, IGNORED, 3, 1]])
    predicted = torch.tensor([[2, 1, 0, 0], [0, 3, 2, 0]])  # by the row before; the second answer's last token is wrong
    first, second = scores_of(4 * functional.one_hot(predicted, 5).double(), labels)
    assert first.greedy and not second.greedy and second.loss - first.loss == pytest.approx(2)


@pytest.mark.parametrize(
    "question, answer, message",
    [
        (QUESTION, " \n", "is empty, so there is nothing to score"),
        ("", "7", "the question is empty"),
        ("What is <image>?", "7", "the question contains <image>"),
        (QUESTION, "7 " * 3000, "a question and its answer take"),
    ],
)
def test_what_cannot_be_scored_is_refused(checkpoint, question, answer, message):
    with pytest.raises(InputError, match=message):
        score(*load(checkpoint, device="cpu"), [Candidate([image()], question, answer)])


def test_a_loss_that_is_not_a_number_is_refused(checkpoint):
    model, processor = load(checkpoint, device="cpu")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite"):
        score(model, processor, CANDIDATES[:1])
