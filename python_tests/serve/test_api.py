"""The official OpenAI client against the server."""

from __future__ import annotations

import base64
import io

import numpy as np
import openai
import pytest
from PIL import Image
from question_files import image
from served import HELD_OUT, NAME, QUESTIONS, TINY, data_url, message, sign

import flexattn_cuda

QUESTION = "What stands there?"


def png(seed: int = 3) -> str:
    buffer = io.BytesIO()
    image(seed=seed).save(buffer, "PNG")
    return data_url(buffer.getvalue(), "image/png")


def alone(server, seed: int, question: str, tokens: int = 32) -> flexattn_cuda.Answer:
    """Return what `ask` answers in Python."""
    model, processor = server.service.model, server.service.processor
    return flexattn_cuda.ask(model, processor, image(seed=seed), question, tokens, trace=True)


# ----------------------------------------------------------------------------------------------------- what is answered


@pytest.mark.parametrize("number", range(4))
def test_an_image_is_answered_as_ask_does(signs, number):
    asked, file = sign(number)
    completion = signs.client().chat.completions.create(model=NAME, messages=[asked])
    model, processor = signs.service.model, signs.service.processor
    expected = flexattn_cuda.ask(model, processor, HELD_OUT / file, QUESTIONS[number]["question"])
    [choice] = completion.choices
    assert choice.message.content == expected.text and choice.finish_reason == "stop"
    assert completion.usage.completion_tokens == len(expected.tokens) and completion.model == NAME


def test_a_stream_is_the_answer_in_pieces(chatting):
    arguments = dict(model=TINY, messages=[message(QUESTION, png())], max_tokens=12)
    whole = chatting.client().chat.completions.create(**arguments)
    chunks = list(
        chatting.client().chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1] if chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content == alone(chatting, 3, QUESTION, 12).text
    assert len(pieces) > 3 and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == 12


def test_text_alone_is_answered(chatting):
    completion = chatting.client().chat.completions.create(
        model=TINY, messages=[{"role": "user", "content": QUESTION}], max_tokens=4
    )
    processor = chatting.service.processor
    ids = processor(text=processor.prompt(QUESTION, images=0))["input_ids"]
    expected = chatting.service.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert completion.choices[0].message.content == processor.tokenizer.decode(expected).strip()
    assert completion.usage.prompt_tokens == ids.shape[1]


def test_a_conversation_reaches_the_model_whole(chatting):
    client, asked = chatting.client(), [message(QUESTION, png())]
    first = client.chat.completions.create(model=TINY, messages=asked, max_tokens=4)
    later = [*asked, first.choices[0].message, message("And there?", png(seed=4))]
    second = client.chat.completions.create(model=TINY, messages=later, max_tokens=8)
    model, processor = chatting.service.model, chatting.service.processor
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": first.choices[0].message.content}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And there?"}]},
    ]
    text = processor.conversation_text(conversation, add_generation_prompt=True)
    inputs = processor(images=[image(seed=3), image(seed=4)], text=text)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert second.choices[0].message.content == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert second.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_a_system_message_changes_the_prompt(chatting):
    asked = [{"role": "user", "content": QUESTION}]
    usage = [
        chatting.client().chat.completions.create(model=TINY, messages=messages, max_tokens=1).usage.prompt_tokens
        for messages in (asked, [{"role": "system", "content": "Hi"}, *asked])
    ]
    assert usage[0] != usage[1]


def test_a_stop_text_ends_the_answer_and_is_left_out(chatting):
    arguments = dict(model=TINY, messages=[message(QUESTION, png())], max_tokens=12)
    whole = chatting.client().chat.completions.create(**arguments).choices[0].message.content
    stop = whole[4:6]
    for stream in (False, True):
        answered = chatting.client().chat.completions.create(**arguments, stop=[stop], stream=stream)
        chunks = list(answered) if stream else [answered]
        text = "".join((one.choices[0].delta if stream else one.choices[0].message).content or "" for one in chunks)
        reason = chunks[-1].choices[0].finish_reason
        assert text == whole[: whole.index(stop)].strip() and reason == "stop"


def test_the_responses_api_gives_the_same_answer(signs):
    record = QUESTIONS[0]
    parts = [
        {"type": "input_text", "text": record["question"]},
        {"type": "input_image", "image_url": data_url(HELD_OUT / record["file"]), "detail": "auto"},
    ]
    client = signs.client()
    chat = client.chat.completions.create(model=NAME, messages=[sign(0)[0]]).choices[0].message.content
    response = client.responses.create(model=NAME, input=[{"role": "user", "content": parts}])
    assert response.output_text == chat and response.status == "completed"
    events = list(client.responses.create(model=NAME, input=[{"role": "user", "content": parts}], stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == chat
    assert events[0].type == "response.created" and events[-1].response.output_text == chat
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_responses_api_takes_its_own_answers_back(chatting):
    client = chatting.client()
    first = client.responses.create(model=TINY, input="Hello there", instructions="Be brief", max_output_tokens=3)
    assert first.status == "incomplete" and first.incomplete_details.reason == "max_output_tokens"
    turns = [{"role": "user", "content": "Hello there"}, *first.output, {"role": "user", "content": "Again"}]
    second = client.responses.create(model=TINY, input=turns, max_output_tokens=3)
    assert second.usage.input_tokens > first.usage.input_tokens


def test_the_model_is_listed(signs):
    [model] = signs.client().models.list().data
    assert model.id == NAME and model.flexattn["layers"] == [1, 2, 3]
    assert signs.client().models.retrieve(NAME).id == NAME


# ------------------------------------------------------------------------------------------------- what it looked at


def test_a_trace_is_what_ask_records(chatting):
    completion = chatting.client().chat.completions.create(
        model=TINY, messages=[message(QUESTION, png())], max_tokens=4, extra_body={"flexattn": {"trace": True}}
    )
    expected = alone(chatting, 3, QUESTION, 4)
    [seen], tokens = completion.flexattn["images"], completion.flexattn["tokens"]
    assert seen == {"width": 160, "height": 120, "frame": [0, -20, 160, 160]}
    assert [token["text"] for token in tokens] == expected.pieces and not any(token["end"] for token in tokens)
    for token, step in zip(tokens, expected.trace.steps):
        assert token["layers"].keys() == {str(layer) for layer in step}
        for layer, traced in step.items():
            attention, mask = (part.numpy() for part in traced.of_image(0, -1, 0))
            [sent] = token["layers"][str(layer)]
            levels, bits = (
                np.frombuffer(base64.b64decode(sent[name]["data"]), np.uint8) for name in ("map", "selected")
            )
            assert np.abs(levels.reshape(attention.shape) - attention / attention.max() * 255).max() <= 0.51
            assert np.array_equal(np.unpackbits(bits)[: mask.size].reshape(mask.shape).astype(bool), mask)
            assert sent["share"] == pytest.approx(mask.mean())


def test_a_streamed_trace_is_the_same(chatting):
    arguments = dict(model=TINY, messages=[message(QUESTION, png())], max_tokens=4)
    trace = {"flexattn": {"trace": True}}
    whole = chatting.client().chat.completions.create(**arguments, extra_body=trace).flexattn
    chunks = list(chatting.client().chat.completions.create(**arguments, stream=True, extra_body=trace))
    sent = [chunk.flexattn for chunk in chunks if getattr(chunk, "flexattn", None)]
    assert sent[0] == {"images": whole["images"]}
    assert [one["token"] for one in sent[1:]] == whole["tokens"]


def test_without_hr_tokens_the_answer_is_that_of_the_low_resolution_model(signs):
    answers = []
    for hr in (True, False):
        asked = [sign(number)[0] for number in range(6)]
        answers.append(
            [
                signs.client()
                .chat.completions.create(model=NAME, messages=[one], extra_body={"flexattn": {"hr": hr}})
                .choices[0]
                .message.content
                for one in asked
            ]
        )
    expected = [record["answer"] for record in QUESTIONS[:6]]
    assert answers[0] == expected and answers[1] != expected
    model, processor = signs.service.model, signs.service.processor
    inputs = processor(
        images=Image.open(HELD_OUT / QUESTIONS[0]["file"]), text=processor.prompt(QUESTIONS[0]["question"])
    )
    del inputs["pixel_values_hr"]
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answers[1][0] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(temperature=0.7), "most probable token"),
        (dict(max_tokens=0), "greater than or equal to 1"),
        (dict(max_tokens=33), "asks for 33 tokens; this server allows at most 32"),
        (dict(n=2), "Input should be 1"),
        (dict(logprobs=True), "False"),
        (dict(tools=[{"type": "function", "function": {"name": "f"}}]), "at most 0 items"),
        (dict(response_format={"type": "json_object"}), "text"),
        (dict(messages=[]), "at least 1 item"),
        (dict(messages=[{"role": "user", "content": " "}]), "question is empty"),
        (dict(messages=[{"role": "user", "content": "Hello"}]), "does not take 0 images"),
        (dict(messages=[message("What?", png(), png(4))]), "marks|does not take 2 images"),
        (dict(messages=[message("What?", "data:image/png;base64,AAAA")]), "not an image"),
        (dict(messages=[message("What?", "data:image/png,AAAA")]), "base64"),
        (dict(messages=[message("What?", "file:///etc/passwd")]), "files of the server are not allowed"),
        (dict(messages=[message("What?", "http://127.0.0.1/a.png")]), "web addresses are not allowed"),
        (dict(messages=[message("What? </s>", png())]), "special token"),
        (dict(messages=[message("why " * 9000, png())]), "ask less"),
        (dict(messages=[sign(0)[0], {"role": "assistant", "content": "12"}]), "must be the user's"),
        (
            dict(messages=[sign(0)[0], {"role": "assistant", "content": "12"}, {"role": "user", "content": "Sure?"}]),
            "no conversation",
        ),
        (dict(extra_body={"flexattn": {"trace": True, "hr": False}}), "nothing to trace"),
        (dict(extra_body={"flexattn": {"no_such": 1}}), "flexattn.no_such: Extra inputs"),
        (dict(extra_body={"no_such": 1}), "no_such: Extra inputs"),
    ],
)
def test_what_cannot_be_right_is_refused_in_a_sentence(signs, changes, says):
    arguments = dict(model=NAME, messages=[sign(0)[0]]) | changes
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        signs.client().chat.completions.create(**arguments)
    assert refused.value.body["type"] == "invalid_request_error" and "\n" not in refused.value.body["message"]


def test_nothing_is_stored_so_a_response_cannot_be_continued_by_its_id(chatting):
    client = chatting.client()
    first = client.responses.create(model=TINY, input="Hello there", store=True, max_output_tokens=3)
    assert first.store is False
    with pytest.raises(openai.BadRequestError, match="stores no responses; send the whole conversation as input"):
        client.responses.create(model=TINY, input="And now?", previous_response_id=first.id)
    assert chatting.get(f"v1/responses/{first.id}").status_code == 404


def test_an_unknown_model_is_not_found(signs):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        signs.client().chat.completions.create(model="gpt-4", messages=[sign(0)[0]])
    with pytest.raises(openai.NotFoundError, match="no such model"):
        signs.client().models.retrieve("a/b")


def test_an_unknown_path_is_not_found(signs):
    answer = signs.get("v1/no_such")
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_form_of_another_page_is_refused(signs):
    """A page elsewhere can send text without asking; JSON needs our leave, which it never gets."""
    answer = signs.post(None, headers={"Content-Type": "text/plain"}, content=b'{"model": "x", "messages": []}')
    assert answer.status_code == 400 and "access-control-allow-origin" not in answer.headers
