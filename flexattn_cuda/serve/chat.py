"""/v1/chat/completions"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response

from flexattn_cuda.serve import traces
from flexattn_cuda.serve.jobs import Done, Event, Prompt
from flexattn_cuda.serve.schemas import ChatRequest
from flexattn_cuda.serve.service import Service
from flexattn_cuda.serve.streams import Answer, pieces, respond_with, server_sent


async def complete(service: Service, request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    started = time.monotonic()
    prompt = await service.prompt(body.model, body.conversation(), body.flexattn)
    wanted = service.wanted(prompt, body.limit, body.stops, body.flexattn)
    writer = _Writer(service.name, prompt, body)
    answer = service.answer(prompt, wanted, started)
    return await respond_with(request, answer, writer.chunks if body.stream else None, writer.completion)


class _Writer:
    """Writes one answer."""

    def __init__(self, model: str, prompt: Prompt, body: ChatRequest):
        self._prompt, self._body = prompt, body
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._end = Done("stop", 0)

    async def completion(self, answer: Answer) -> dict[str, Any]:
        text, tokens = "", []
        async with answer as events:
            async for piece in pieces(events, self._done):
                text += piece.text
                tokens += [] if piece.token is None else [piece.token]
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._end.reason}
        completion = {"object": "chat.completion", **self._head, "choices": [choice], "usage": self._usage()}
        return completion | ({"flexattn": {**self._images(), "tokens": tokens}} if self._body.flexattn.trace else {})

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        images = self._images() if self._body.flexattn.trace else None
        yield self._chunk({"role": "assistant", "content": ""}, extension=images)
        async for piece in pieces(events, self._done):
            extension = None if piece.token is None else {"token": piece.token}
            yield self._chunk({"content": piece.text}, extension=extension)
        yield self._chunk({}, reason=self._end.reason)
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield server_sent({"object": "chat.completion.chunk", **self._head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, extension: dict[str, Any] | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {"object": "chat.completion.chunk", **self._head, "choices": [choice]}
        return server_sent(chunk if extension is None else chunk | {"flexattn": extension})

    def _done(self, end: Done) -> None:
        self._end = end

    def _images(self) -> dict[str, Any]:
        return {"images": [traces.image_view(image) for image in self._prompt.images]}

    def _usage(self) -> dict[str, int]:
        asked, answered = self._prompt.length, self._end.tokens
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}
