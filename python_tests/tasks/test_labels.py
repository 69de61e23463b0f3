"""Training data: what is learned is what `generate` continues."""

from __future__ import annotations

import pytest
import tiny
import tiny_checkpoint
from PIL import Image
from question_files import QUESTION
from tiny_checkpoint import processor

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import training_data as data
from flexattn_cuda.tasks.load import DEFAULT_MODEL
from flexattn_cuda.tasks.training_data import BrokenRecordError, Conversation, Turn
from studies.default_model.encoder import SIZES
from studies.default_model.processor import build_processor
from studies.small.presets import settings_for

# As published with llava-hf/llava-1.5-7b-hf: no end after an answer. And one with a line break after the end.
PLAIN = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


LINES = (
    "{% for message in messages %}{{ '[' + message['role'] + ']\n' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


PROCESSORS = {
    "image is a token": {},
    "split at images": {"split_at_images": True},
    "no prefix inside": {"split_at_images": True, "prefix_everywhere": False},
    "a template without ends": {"chat_template": PLAIN},
    "split, a template without ends": {"chat_template": PLAIN, "split_at_images": True},
    "a template with lines": {"chat_template": LINES},
}


TURNS = [
    Turn(QUESTION, 1, "42"),
    Turn("And on the blue one?", 0, "There is no blue sign."),
    Turn("Compare the next.", 1, "é 漢"),
]


def learned(labels: list[int]) -> list[list[int]]:
    """The runs of labels, each an answer."""
    runs: list[list[int]] = [[]]
    for label in labels:
        runs[-1].append(label) if label != data.IGNORED else runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS.keys())
@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_answer_is_learned_with_its_end_from_where_generate_would_start(options, count):
    one = processor(**options)
    ids, labels = data.labelled_ids(one, TURNS[:count])
    assert len(ids) == len(labels) and all(label in (data.IGNORED, token) for token, label in zip(ids, labels))
    runs = learned(labels)
    assert [answering.answer_text(one, run) for run in runs] == [turn.answer for turn in TURNS[:count]]
    assert all(run[-1] == 2 and run.count(2) == 1 for run in runs)
    begin = next(position for position, label in enumerate(labels) if label != data.IGNORED)
    assert ids[:begin] == one(text=one.prompt(QUESTION), images=Image.new("RGB", (9, 9)))["input_ids"][0].tolist()
    assert ids.count(tiny_checkpoint.IMAGE_ID) == sum(turn.images for turn in TURNS[:count]) * tiny.SIDE**2


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_later_answers_follow_the_prompt_of_the_conversation_so_far(options):
    one = processor(**options)
    ids, labels = data.labelled_ids(one, TURNS[:2])
    begin = max(position for position, label in enumerate(labels) if label == data.IGNORED) + 1
    end = "" if options.get("chat_template") != PLAIN else "</s>"
    content = [
        [{"type": "image"}, {"type": "text", "text": QUESTION}],
        [{"type": "text", "text": TURNS[0].answer + end}],
    ]
    content.append([{"type": "text", "text": TURNS[1].question}])
    messages = [dict(role=role, content=part) for role, part in zip(("user", "assistant", "user"), content)]
    prompt = one.apply_chat_template(messages, add_generation_prompt=True)
    assert ids[:begin] == one(text=prompt, images=Image.new("RGB", (9, 9)))["input_ids"][0].tolist()


def test_a_template_that_renders_questions_alone_gets_the_answer_and_its_end():
    one = FlexAttnLlavaProcessor.from_pretrained(DEFAULT_MODEL)
    ids, labels = data.labelled_ids(one, [Turn(QUESTION, 1, "42")])
    digits = one.tokenizer.convert_tokens_to_ids(["4", "2"])
    assert learned(labels) == [[*digits, one.tokenizer.eos_token_id]]
    assert ids[:-3] == one(text=one.prompt(QUESTION), images=Image.new("RGB", (9, 9)))["input_ids"][0].tolist()
    with pytest.raises(BrokenRecordError, match="renders single questions only; this conversation has 2"):
        data.labelled_ids(one, TURNS[:2])
    with pytest.raises(BrokenRecordError, match="makes 144 image tokens for 0 images"):
        data.encode(one, Conversation([], [Turn("Hello?", 0, "42")]), 500)


def test_a_record_of_exactly_the_maximum_length_is_accepted():
    one, conversation = processor(), Conversation(["image.png"], [Turn(QUESTION, 1, "42")])
    length = len(data.labelled_ids(one, conversation.turns)[0])
    assert len(data.encode(one, conversation, length)[0]) == length
    with pytest.raises(BrokenRecordError, match=f"takes {length} tokens, .* the maximum is {length - 1}"):
        data.encode(one, conversation, length - 1)


def test_an_answer_that_the_tokenizer_has_no_token_for_is_reported():
    one = build_processor(settings_for("flexattn", SIZES))
    question = "What does the red sign say?"
    letters = one.tokenizer.convert_tokens_to_ids(list("STOP"))
    assert data.labelled_ids(one, [Turn(question, 1, "STOP")]).labels[-5:-1] == letters
    with pytest.raises(BrokenRecordError, match="no token for a part of the answer 'stop'"):
        data.labelled_ids(one, [Turn(question, 1, "stop")])
    one.tokenizer.unk_token = one.tokenizer.eos_token  # as GPT-2's, which has a token for any text
    assert data.labelled_ids(one, [Turn(question, 1, "STOP")]).labels[-1] == one.tokenizer.eos_token_id


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS.keys())
@pytest.mark.parametrize("turn", [Turn("What is </s>?", 1, "An end."), Turn("What is it?", 1, "It is <s>.")])
def test_a_record_with_the_text_of_a_special_token_is_reported(tmp_path, options, turn):
    one = processor(**options)
    with pytest.raises(InputError, match="a special token of the model"):
        data.labelled_ids(one, [turn])
    parts = [{"from": "human", "value": f"<image>\n{turn.question}"}, {"from": "gpt", "value": turn.answer}]
    records = [{"image": "image.png", "conversations": parts}]
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    found = data.check(records, tmp_path, lambda conversation: data.encode(one, conversation, 400)).broken
    assert [(broken.record, broken.kind) for broken in found] == [(0, "conversation that cannot be asked")]
