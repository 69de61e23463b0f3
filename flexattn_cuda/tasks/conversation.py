"""Many questions about one image. What was said stays in the key/value cache, so that a question costs its own tokens.

conversation = Conversation(*flexattn_cuda.load("DIR"), "image.jpg")
print(conversation.ask("What is on the left?").text)
print(conversation.ask("And what is beside it?").text)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria

from flexattn_cuda.checkpoints.files import refusing
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.families.attached import AttachedModel
from flexattn_cuda.inputs.image_sources import read_image
from flexattn_cuda.inputs.questions import check_question, user_message
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from flexattn_cuda.tasks.ask import Answer, Recording, end_ids, generate_greedily, until_end
from flexattn_cuda.tasks.encoded import encoded
from flexattn_cuda.tasks.models import HRModel, TrainingProcessor, max_positions, selects
from flexattn_cuda.tasks.options import MAX_NEW_TOKENS


def conversation_text(processor: TrainingProcessor, messages: list[dict[str, Any]]) -> str:
    """Return the prompt of a conversation, up to where the answer begins.

    Args:
        processor: Of the model.
        messages: As chat templates take them, with contents that are lists of parts.

    Raises:
        InputError: If the chat template leaves messages out, or a text contains a special token.
        CheckpointError: If the chat template fails.
    """
    with refusing("the chat template of the checkpoint fails", InputError):
        text = processor.conversation_text(messages, add_generation_prompt=True)
    said = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    if not all(part.strip() in text for part in said):
        raise InputError(
            "this model takes one question about an image, and no conversation: its chat template leaves messages "
            "out; send a single message of the user"
        )
    return text


def holds_conversations(processor: TrainingProcessor) -> bool:
    """Return whether the chat template of a model takes more than one question."""
    try:
        conversation_text(processor, [user_message("qu1"), _answered("an1"), user_message("qu2", images=0)])
    except (InputError, CheckpointError):
        return False
    return True


class Conversation:
    """Questions about an image, which is encoded once, and their answers.

    If the chat template takes one question alone, each is asked afresh, and shares the keys of the image at most.

    Args:
        model: As `load` returns it.
        processor: As `load` returns it.
        image: A file, URL, PIL image or what else `read_image` takes.

    Attributes:
        image: The image, upright.
        remembers: Whether a question can refer to those before it.

    Raises:
        InputError: If the image cannot be read.
    """

    def __init__(self, model: HRModel, processor: TrainingProcessor, image: Any):
        self._model, self._processor = model, processor
        self.image = read_image(image)
        self.remembers = holds_conversations(processor)
        self._images = encoded(model, processor.image_inputs([self.image]))
        self._keeps_keys = not isinstance(model, AttachedModel) or model.hr_family.causal_prompts
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._messages: list[dict[str, Any]] = []
        self._forget_keys()

    def _forget_keys(self) -> None:
        self._cache, self._ids = DynamicCache(), []  # the ids of the positions whose keys can be used again

    def ask(
        self,
        question: str,
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_text: Callable[[str], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer a question, greedily, and record what every step looks at where the model selects.

        Args:
            question: The question.
            max_new_tokens: Maximum length of the answer in tokens.
            on_text: Called with each piece of the answer as soon as it is known.
            stop: Called after every token; True ends the answer there.

        Raises:
            InputError: If the question cannot be asked, or the conversation is too long for the model.
        """
        check_question(question)
        inputs = self._inputs(question)
        limit = min(max_new_tokens, self._room(len(inputs["input_ids"])))
        recording = Recording(self._processor, on_text, selects(self._model))
        try:
            tokens = self._generate(inputs, limit, recording, stop)
        except BaseException:  # Ctrl-C too: the keys of some layers may be missing
            self._forget_keys()
            raise
        answer = recording.answer(question, [self.image], tokens)
        if self.remembers:
            self._messages += [self._asked(question), _answered(answer.text)]
        return answer

    def _asked(self, question: str) -> dict[str, Any]:
        return user_message(question, images=0 if self._messages else 1)

    def _inputs(self, question: str) -> dict[str, list[int]]:
        """Return the ids of the whole conversation, and what else the model takes of each position."""
        if self._messages:
            text = conversation_text(self._processor, [*self._messages, self._asked(question)])
        else:
            text = self._processor.prompt(question)
        return self._processor.conversation_inputs(text, [self._processor.image_tokens_of(*self.image.size)])

    def _room(self, length: int) -> int:
        """Return the maximum length of the answer to a prompt of so many tokens; InputError if there is no room."""
        limit = max_positions(self._model)
        if length >= limit:
            raise InputError(
                f"the conversation takes {length} tokens with this question, and the model has {limit} positions; "
                "ask a shorter question, or reset the conversation"
            )
        return limit - length

    def _generate(
        self, inputs: dict[str, list[int]], limit: int, recording: Recording, stop: Callable[[], bool]
    ) -> list[int]:
        """Return the tokens of the answer, and keep the keys that the next question can begin with."""
        ids, device = inputs["input_ids"], self._model.device
        given: dict[str, Any] = {"input_ids": torch.tensor([ids], device=device)}
        if not self._rewind(ids):
            self._forget_keys()
            given = {name: torch.tensor([values], device=device) for name, values in inputs.items()} | self._images
        new = generate_greedily(
            self._model,
            self._processor,
            given | {"attention_mask": torch.ones_like(given["input_ids"])},
            limit,
            streamer=recording.streamer,
            flexattn_trace=recording.trace,
            stopping_criteria=[_Stop(stop)],
            **{CACHE_ARGUMENT: self._cache},
        )
        [row] = new.tolist()
        # The last position of a prompt sees HR tokens, which it does not do inside another prompt.
        self._ids = (ids + row)[: self._cache.get_seq_length()] if self.remembers else ids[:-1]
        return until_end(row, end_ids(self._model, self._processor))

    def _rewind(self, ids: list[int]) -> bool:
        """Crop the cache to what it shares with a prompt; return False unless that is the image at least.

        An answer is rarely cut into other tokens when it is read again; then a few are computed again.
        """
        kept = min(_common(self._ids, ids), len(ids) - 1)
        image_end = len(ids) - ids[::-1].index(self._processor.image_token_id)
        if not self._keeps_keys or kept < image_end:
            return False
        if surplus := int(self._cache.get_seq_length()) - kept:
            self._cache.crop(-surplus)
        return True


class _Stop(StoppingCriteria):
    """Ends all rows as soon as a function says so."""

    def __init__(self, stop: Callable[[], bool]):
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stop(), dtype=torch.bool, device=input_ids.device)


def _answered(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many elements two sequences have in common at their beginnings."""
    return next((n for n, (one, other) in enumerate(zip(first, second)) if one != other), min(len(first), len(second)))
