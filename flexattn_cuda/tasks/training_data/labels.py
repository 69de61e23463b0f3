"""Conversations as token ids, and labels for what is learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError

from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.inputs.questions import user_message
from flexattn_cuda.tasks.training_data.records import BrokenRecordError, Conversation, Turn

IGNORED = -100  # the label of a position that nothing is learned from


class LabelledIds(NamedTuple):
    """Token ids and labels, of equal length: a label is the id itself in an answer, and IGNORED elsewhere."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class _TokenizedTurn:
    """A turn as token ids.

    Attributes:
        prompt: From the end of the previous answer to the beginning of this one.
        answer: The answer, with its end.
    """

    prompt: list[int]
    answer: list[int]


def encode(
    processor: FlexAttnLlavaProcessor, conversation: Conversation, max_length: int, ends: Sequence[int] | None = None
) -> LabelledIds:
    """Return `labelled_ids` of a conversation.

    Raises:
        BrokenRecordError: If the chat template cannot render it, or it is longer than `max_length` tokens.
    """
    ids, labels = labelled_ids(processor, conversation.turns, ends)
    image_tokens = ids.count(processor.image_token_id)
    if image_tokens != len(conversation.images) * processor.image_tokens:
        raise BrokenRecordError(
            "conversation that the chat template cannot render",
            f"the model's chat template makes {image_tokens} image tokens for {len(conversation.images)} images",
        )
    answers = sum(label != IGNORED for label in labels)
    if answers > max_length:
        raise BrokenRecordError("answer too long", f"the answers take {answers} tokens; the maximum is {max_length}")
    if len(ids) > max_length:
        raise BrokenRecordError(
            "record too long",
            f"the record takes {len(ids)} tokens, {answers} of them answers; the maximum is {max_length}",
        )
    return LabelledIds(ids, labels)


def labelled_ids(
    processor: FlexAttnLlavaProcessor, turns: Sequence[Turn], ends: Sequence[int] | None = None
) -> LabelledIds:
    """Tokenize a conversation and label its answers, each with its end.

    The ids before an answer are those of the prompt that asks for it, so what is learned is what `generate` continues.

    Args:
        processor: The model's processor.
        turns: The conversation.
        ends: Ids that end an answer; by default the tokenizer's end-of-sequence id.

    Raises:
        BrokenRecordError: If the chat template cannot render such a conversation.
    """
    ends = [processor.tokenizer.eos_token_id] if ends is None else list(ends)
    eos = processor.tokenizer.eos_token or ""
    # Some templates leave it to the training code to end an answer, and some render questions alone.
    tokenized = (
        _tokenize_by_template(processor, turns, ends, end_text="")
        or _tokenize_by_template(processor, turns, ends, end_text=eos)
        or [_tokenize_single_turn(processor, turns, ends[0])]
    )
    ids: list[int] = []
    labels: list[int] = []
    for turn in tokenized:
        prompt = processor.expand_image_tokens(turn.prompt)
        ids += [*prompt, *turn.answer]
        labels += [IGNORED] * len(prompt) + turn.answer
    return LabelledIds(ids, labels)


def _tokenize_by_template(
    processor: FlexAttnLlavaProcessor, turns: Sequence[Turn], ends: list[int], end_text: str
) -> list[_TokenizedTurn] | None:
    """Tokenize turns by the chat template; None if it cannot serve.

    It can if the ids of the conversation so far begin with those of the prompt before, and every answer has an end.
    """
    messages: list[dict[str, Any]] = []
    tokenized: list[_TokenizedTurn] = []
    before: list[int] = []
    for turn in turns:
        messages.append(user_message(turn.question, turn.images))
        try:
            prompt = processor.tokenize(processor.apply_chat_template(messages, add_generation_prompt=True))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer + end_text}]})
            whole = processor.tokenize(processor.apply_chat_template(messages))
        except TemplateError:
            return None
        if prompt[: len(before)] != before or whole[: len(prompt)] != prompt:
            return None
        answer = whole[len(prompt) :]
        last = next((position for position in reversed(range(len(answer))) if answer[position] in ends), None)
        if last is None:
            return None
        tokenized.append(_TokenizedTurn(prompt[len(before) :], answer[: last + 1]))
        before = whole[: len(prompt) + last + 1]
    return tokenized


def _tokenize_single_turn(processor: FlexAttnLlavaProcessor, turns: Sequence[Turn], end: int) -> _TokenizedTurn:
    if len(turns) > 1:
        raise BrokenRecordError(
            "conversation that the chat template cannot render",
            f"the model's chat template renders single questions only; this conversation has {len(turns)}",
        )
    [turn] = turns
    prompt = processor.tokenize(processor.prompt(turn.question, turn.images))
    return _TokenizedTurn(prompt, [*processor.tokenizer(turn.answer, add_special_tokens=False)["input_ids"], end])
