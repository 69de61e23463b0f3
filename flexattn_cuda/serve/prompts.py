"""Messages to token ids and images."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.inputs.images import decode_image
from flexattn_cuda.inputs.questions import check_question
from flexattn_cuda.serve.errors import RequestError
from flexattn_cuda.serve.images import ImageCache, ServedImage
from flexattn_cuda.serve.jobs import Prompt
from flexattn_cuda.serve.sources import Sources
from flexattn_cuda.tasks.ask import room
from flexattn_cuda.tasks.conversation import conversation_text
from flexattn_cuda.tasks.models import HRModel, TrainingProcessor, max_positions

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_IMAGES = 8
_CHARACTERS_PER_POSITION = 50  # a longer text is too long, however it is cut into tokens
_DECODERS = threading.BoundedSemaphore(2)  # large images are decoded two at a time, for the sake of memory


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
        role: system, user or assistant.
        texts: Its texts.
        images: URLs of its images, which come before the texts.
    """

    role: str
    texts: list[str]
    images: list[str]

    def as_template_takes_it(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        parts: list[dict[str, str]] = [{"type": "image"} for _ in self.images]
        return {"role": self.role, "content": parts + [{"type": "text", "text": text} for text in self.texts]}


@dataclass(frozen=True)
class PromptReader:
    """Makes prompts of messages, in any thread.

    Attributes:
        model: Of which only the configuration is read.
        processor: Its processor.
        sources: What images may come from.
        cache: Encoded images.
        max_pixels: Maximum size of an image.
    """

    model: HRModel
    processor: TrainingProcessor
    sources: Sources
    cache: ImageCache
    max_pixels: int

    def read(self, messages: Sequence[Message]) -> Prompt:
        """Return the prompt of a conversation, up to where the answer begins.

        Raises:
            RequestError: If the model cannot be asked this.
        """
        urls = [url for message in messages for url in message.images]
        if len(urls) > MAX_IMAGES:
            raise RequestError(
                f"the request has {len(urls)} images; at most {MAX_IMAGES} are allowed", param="messages"
            )
        try:
            self._check(messages)
            text = self._text(messages)
            images = [self._image(url) for url in urls]
            return Prompt(self._inputs(text, images), images)
        except (InputError, CheckpointError) as error:
            raise RequestError(str(error), param="messages") from None

    def room(self, prompt: Prompt) -> int:
        """Return the maximum length of an answer in tokens."""
        return room(self.model, prompt.length)

    def _check(self, messages: Sequence[Message]) -> None:
        if messages[-1].role != "user":
            raise InputError(f"the last message is one of the {messages[-1].role}; it must be the user's")
        for message in messages:
            if message.images and message.role != "user":
                raise InputError(f"a message of the {message.role} has an image; only the user's may")
            if not message.texts:
                raise InputError(f"a message of the {message.role} has no text; ask a question about the image")
            for text in message.texts:
                check_question(text)
        length, limit = sum(len(text) for one in messages for text in one.texts), max_positions(self.model)
        if length > limit * _CHARACTERS_PER_POSITION:
            raise InputError(f"the messages have {length} characters; the model has {limit} positions, so ask less")

    def _text(self, messages: Sequence[Message]) -> str:
        if len(messages) == 1 and len(messages[0].texts) == 1:
            return self.processor.prompt(messages[0].texts[0], images=len(messages[0].images))
        conversation = [message.as_template_takes_it() for message in messages]
        return conversation_text(self.processor, conversation)

    def _inputs(self, text: str, images: Sequence[ServedImage]) -> dict[str, list[int]]:
        tokens = [self.processor.image_tokens_of(image.width, image.height) for image in images]
        inputs = self.processor.conversation_inputs(text, tokens)
        ids = inputs["input_ids"]
        if ids.count(self.processor.image_token_id) != sum(tokens):
            raise InputError(
                f"the prompt of this model does not take {len(images)} images; send one image with the question"
            )
        room(self.model, len(ids))
        return inputs

    def _image(self, url: str) -> ServedImage:
        content = self.sources.read(url)
        digest = hashlib.sha256(content).hexdigest()
        kept = self.cache.find(digest)
        if kept is not None:
            return kept
        with _DECODERS:
            image = decode_image(content, FORMATS, self.max_pixels)
            inputs = self.processor.image_inputs([image])
        return ServedImage(digest, image.width, image.height, self.processor.frame(*image.size), inputs)
