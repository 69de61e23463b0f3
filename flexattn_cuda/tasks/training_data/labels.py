"""Conversations as token ids, and labels for what is learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from flexattn_cuda.inputs.images import image_size
from flexattn_cuda.inputs.questions import user_message
from flexattn_cuda.tasks.models import TrainingProcessor
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
    processor: TrainingProcessor,
    conversation: Conversation,
    max_length: int,
    ends: Sequence[int] | None = None,
    images: str | Path = ".",
) -> LabelledIds:
    """Return `labelled_ids` of a conversation.

    Args:
        processor: The model's processor.
        conversation: The conversation.
        max_length: Maximum number of tokens.
        ends: Ids that end an answer; by default the tokenizer's end-of-sequence id.
        images: Folder that the paths of the images are relative to; read where their size decides how many tokens they
            take.

    Raises:
        BrokenRecordError: If the chat template cannot render it, or it is longer than `max_length` tokens.
        InputError: If a text or an image cannot be used.
    """
    tokens = _image_tokens(processor, [Path(images, image) for image in conversation.images])
    ids, labels = labelled_ids(processor, conversation.turns, ends, tokens)
    image_tokens = ids.count(processor.image_token_id)
    if image_tokens != sum(tokens):
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


def _image_tokens(processor: TrainingProcessor, images: Sequence[Path]) -> list[int]:
    if processor.image_tokens is not None:
        return [processor.image_tokens] * len(images)
    return [processor.image_tokens_of(*image_size(image)) for image in images]


def labelled_ids(
    processor: TrainingProcessor,
    turns: Sequence[Turn],
    ends: Sequence[int] | None = None,
    image_tokens: Sequence[int] | None = None,
) -> LabelledIds:
    """Tokenize a conversation and label its answers, each with its end.

    The ids before an answer are those of the prompt that asks for it, so what is learned is what `generate` continues.

    Args:
        processor: The model's processor.
        turns: The conversation.
        ends: Ids that end an answer; by default the tokenizer's end-of-sequence id.
        image_tokens: Number of image tokens of each image; by default what every image takes, whatever its size.

    Raises:
        BrokenRecordError: If the chat template cannot render such a conversation, or the tokenizer an answer.
    """
    if image_tokens is None:
        image_tokens = _image_tokens(processor, [Path()] * sum(turn.images for turn in turns))
    ends = [processor.tokenizer.eos_token_id] if ends is None else list(ends)
    tokenizer = _TurnTokenizer(processor, turns, ends, image_tokens)
    # Some templates leave it to the training code to end an answer, and some render questions alone.
    tokenized = (
        tokenizer.by_template(end_text="")
        or tokenizer.by_template(end_text=processor.tokenizer.eos_token or "")
        or [tokenizer.single_turn()]
    )
    unknown = {processor.tokenizer.unk_token_id}.difference(ends)  # some tokenizers name one token for both
    ids: list[int] = []
    labels: list[int] = []
    for turn, tokens in zip(turns, tokenized):
        if unknown.intersection(tokens.answer):
            raise BrokenRecordError(
                "answer that the model cannot write",
                f"the model's tokenizer has no token for a part of the answer {turn.answer!r}",
            )
        ids += [*tokens.prompt, *tokens.answer]
        labels += [IGNORED] * len(tokens.prompt) + tokens.answer
    return LabelledIds(ids, labels)


@dataclass(frozen=True)
class _TurnTokenizer:
    """Turns a conversation into ids, turn by turn."""

    processor: TrainingProcessor
    turns: Sequence[Turn]
    ends: list[int]
    image_tokens: Sequence[int]

    def by_template(self, end_text: str) -> list[_TokenizedTurn] | None:
        """Tokenize turns by the chat template; None if it cannot serve.

        It can if the ids of the conversation so far begin with those of the prompt before, and every answer has an end.
        """
        messages: list[dict[str, Any]] = []
        tokenized: list[_TokenizedTurn] = []
        before: list[int] = []
        images = 0
        for turn in self.turns:
            images += turn.images
            messages.append(user_message(turn.question, turn.images))
            try:
                prompt = self._ids(messages, images, add_generation_prompt=True)
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer + end_text}]})
                whole = self._ids(messages, images)
            except TemplateError:
                return None
            if prompt[: len(before)] != before or whole[: len(prompt)] != prompt:
                return None
            answer = whole[len(prompt) :]
            last = next((position for position in reversed(range(len(answer))) if answer[position] in self.ends), None)
            if last is None:
                return None
            tokenized.append(_TokenizedTurn(prompt[len(before) :], answer[: last + 1]))
            before = whole[: len(prompt) + last + 1]
        return tokenized

    def _ids(self, messages: list[dict[str, Any]], images: int, add_generation_prompt: bool = False) -> list[int]:
        text = self.processor.conversation_text(messages, add_generation_prompt)
        return self.processor.conversation_ids(text, self.image_tokens[:images])

    def single_turn(self) -> _TokenizedTurn:
        """Tokenize the prompt of a question, then its answer and an end."""
        if len(self.turns) > 1:
            raise BrokenRecordError(
                "conversation that the chat template cannot render",
                f"the model's chat template renders single questions only; this conversation has {len(self.turns)}",
            )
        [turn] = self.turns
        prompt = self.processor.conversation_ids(self.processor.prompt(turn.question, turn.images), self.image_tokens)
        answer = self.processor.tokenizer(turn.answer, add_special_tokens=False)["input_ids"]
        return _TokenizedTurn(prompt, [*answer, self.ends[0]])
