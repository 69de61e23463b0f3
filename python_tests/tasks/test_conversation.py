"""A conversation about an image: its answers are those of the whole conversation, whose beginning is not read again."""

from __future__ import annotations

import attached_checkpoint
import pytest
import torch
from question_files import EXAMPLES, SIGNS, image

from flexattn_cuda import ask, load
from flexattn_cuda.errors import InputError
from flexattn_cuda.tasks.conversation import Conversation, holds_conversations

QUESTIONS = ["what is this", "is this what", "what"]
ANSWER = 5  # tokens
ATTACHED = sorted(attached_checkpoint.CHECKPOINTS.keys() - {"llava", "llava_siglip"})
TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message['content'] %}{{ 'MARK' if part['type'] == 'image' else part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


class Lengths:
    """The positions of each forward call of a model."""

    def __init__(self, model):
        inner = model.model
        text = inner.language_model if hasattr(inner, "language_model") else inner.text_model
        text.register_forward_pre_hook(self._heard, with_kwargs=True)
        self.calls: list[int] = []

    def _heard(self, module, args, kwargs) -> None:
        self.calls.append(kwargs["inputs_embeds"].shape[1])

    def pop(self) -> list[int]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture(params=["own", *(pytest.param(name, marks=pytest.mark.slow) for name in ATTACHED)])
def loaded(request, checkpoint, tmp_path):
    """A model that holds conversations, in float64, and its processor."""
    name = request.param
    folder = checkpoint if name == "own" else attached_checkpoint.CHECKPOINTS[name].save(tmp_path / name)
    model, processor = load(folder, "cpu", dtype="float64")
    if name != "own":
        processor.chat_template = TEMPLATE.replace("MARK", attached_checkpoint.CHECKPOINTS[name].mark)
    # Ids without a text of their own would be other ids when the answer is read again.
    vocabulary = model.get_output_embeddings().weight.shape[0]
    words = {token for token in range(vocabulary) if reread(processor, [token] * 2) == [token] * 2}
    model.generation_config.suppress_tokens = sorted(set(range(vocabulary)) - words)
    return model, processor


def reread(processor, tokens: list[int]) -> list[int]:
    """Return the ids of the text of some."""
    return processor.tokenizer(processor.tokenizer.decode(tokens, skip_special_tokens=True), add_special_tokens=False)[
        "input_ids"
    ]


def whole_conversation(model, conversation: Conversation, turns: list[tuple[list[int], list[int]]]) -> list[list[int]]:
    """Return what one call without a cache, whose rows that predict an answer see HR tokens, says in every turn.

    Args:
        model: The model.
        conversation: The conversation, for its image.
        turns: Of each question, the ids of the conversation up to it, and those of the answer.
    """
    ids = torch.tensor([turns[-1][0] + turns[-1][1]])
    labels = torch.full_like(ids, -100)
    for prompt, answer in turns:
        assert ids[0, : len(prompt) + len(answer)].tolist() == prompt + answer, "the answer was cut into other tokens"
        labels[:, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if (types := conversation._processor.token_types) is not None:
        text[types] = (ids == conversation._processor.image_token_id).long()
    images = conversation._processor.image_inputs([conversation.image])
    with torch.no_grad():
        logits = model(**text, **images, labels=labels, use_cache=False).logits[0]
    logits[:, model.generation_config.suppress_tokens] = -torch.inf
    said = logits.argmax(-1).tolist()
    return [said[len(prompt) - 1 : len(prompt) - 1 + len(answer)] for prompt, answer in turns]


def test_answers_are_those_of_the_whole_conversation(loaded):
    model, processor = loaded
    conversation, lengths = Conversation(model, processor, image()), Lengths(model)
    assert conversation.remembers
    turns = []
    for question in QUESTIONS:
        prompt = conversation._inputs(question)["input_ids"]
        answer = conversation.ask(question, ANSWER)
        turns.append((prompt, answer.tokens))
        known = sum(map(len, turns[-2])) if len(turns) > 1 and conversation._keeps_keys else 0
        read, *steps = lengths.pop()
        # The last token of an answer was never read.
        assert read - (len(prompt) - known) in ((0, 1) if known else (0,)) and set(steps) == {1}
    if conversation._keeps_keys:
        assert whole_conversation(model, conversation, turns) == [answer for _, answer in turns]


def test_without_hr_tokens_an_answer_is_what_generate_says_to_the_whole_conversation(checkpoint):
    model, processor = load(checkpoint, "cpu", system="llava", dtype="float64")
    conversation = Conversation(model, processor, image())
    for question in QUESTIONS:
        ids = torch.tensor([conversation._inputs(question)["input_ids"]])
        images = processor.image_inputs([conversation.image])
        whole = model.generate(input_ids=ids, **images, max_new_tokens=ANSWER, do_sample=False)
        assert conversation.ask(question, ANSWER).tokens == whole[0, ids.shape[1] :].tolist()


def test_an_answer_depends_on_what_was_said_before(checkpoint):
    conversation = Conversation(*load(checkpoint, "cpu"), image())
    first = conversation.ask("why", ANSWER).text
    second = conversation.ask("why", ANSWER).text
    conversation.reset()
    assert conversation.ask("why", ANSWER).text == first != second


def test_what_was_looked_at_can_be_drawn_in_every_turn(checkpoint):
    conversation = Conversation(*load(checkpoint, "cpu"), image())
    drawings = [conversation.ask("why", 2).draw(token="all") for _ in range(2)]
    assert drawings[0].size[0] == drawings[1].size[0] and drawings[0].tobytes() != drawings[1].tobytes()


@pytest.mark.slow
def test_a_model_that_takes_one_question_answers_each_as_ask_does_and_encodes_the_image_once():
    model, processor = load(device="cpu")
    assert not holds_conversations(processor)
    encoded, lengths = [], Lengths(model)
    model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    conversation = Conversation(model, processor, EXAMPLES / SIGNS[0]["file"])
    calls, questions = len(encoded), [f"What does the sign say that is {one}?" for one in ("red", "green", "purple")]
    said = [conversation.ask(question).text for question in questions * 2]
    read = [length for length in lengths.pop() if length > 1]
    assert len(encoded) == calls > 0 and len(read) <= 1, "only the first question reads the image"
    assert said == [ask(model, processor, conversation.image, question).text for question in questions * 2]


@pytest.mark.slow
def test_the_end_of_a_question_which_sees_hr_tokens_is_read_again_inside_a_longer_one():
    model, processor = load(device="cpu")
    conversation, lengths = Conversation(model, processor, EXAMPLES / SIGNS[0]["file"]), Lengths(model)
    for question in ("What does the sign say that is red", "What does the sign say that is red red"):
        conversation.ask(question)
    _, read = (length for length in lengths.pop() if length > 1)
    assert read == 2


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_conversation_goes_on_after_an_answer_that_was_stopped(checkpoint, interrupted):
    model, processor = load(checkpoint, "cpu")
    conversation, lengths, heard = Conversation(model, processor, image()), Lengths(model), []

    def stop() -> bool:
        if interrupted and len(heard) > 1:
            raise KeyboardInterrupt
        return len(heard) > 1

    first = conversation.ask("why", ANSWER)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("what is this", 20, heard.append, stop)
    else:
        assert 0 < len(conversation.ask("what is this", 20, heard.append, stop).tokens) < 20
    lengths.pop()
    answer = conversation.ask("how", ANSWER)
    assert (lengths.pop()[0] > 144) == interrupted, "keys that may be incomplete are made again"
    if interrupted:
        alone = Conversation(model, processor, image())
        assert alone.ask("why", ANSWER).text == first.text
        alone._forget_keys()
        assert alone.ask("how", ANSWER).text == answer.text


@pytest.mark.parametrize(
    "question, says",
    [
        ("", "the question is empty"),
        ("\udcff", "half of a surrogate pair"),
        ("why </s>", "contains '</s>'"),
        ("why " * 400, "reset the conversation"),
    ],
)
def test_a_question_that_cannot_be_asked_changes_nothing(checkpoint, question, says):
    model, processor = load(checkpoint, "cpu")
    asked, other = (Conversation(model, processor, image()) for _ in range(2))
    for conversation in (asked, other):
        conversation.ask("why", ANSWER)
    with pytest.raises(InputError, match=says):
        asked.ask(question, ANSWER)
    assert asked.ask("how", ANSWER).tokens == other.ask("how", ANSWER).tokens
