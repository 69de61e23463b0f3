"""/v1/responses: the same answers in the form of OpenAI's newer API. Nothing is stored."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response

from flexattn_cuda.serve.errors import RequestError
from flexattn_cuda.serve.jobs import Done, Event, Prompt
from flexattn_cuda.serve.schemas import ResponsesRequest
from flexattn_cuda.serve.service import Service
from flexattn_cuda.serve.streams import Answer, pieces, respond_with, server_sent


async def respond(service: Service, request: Request, body: ResponsesRequest) -> Response:
    """Answer a conversation.

    Raises:
        RequestError: If it cannot be answered, or asks for a trace.
    """
    started = time.monotonic()
    if body.flexattn.trace:
        raise RequestError("/v1/responses sends no trace; use /v1/chat/completions, or leave flexattn.trace out")
    prompt = await service.prompt(body.model, body.conversation(), body.flexattn)
    wanted = service.wanted(prompt, body.max_output_tokens, (), body.flexattn)
    writer = _Writer(service.name, prompt, body)
    answer = service.answer(prompt, wanted, started)
    return await respond_with(request, answer, writer.events if body.stream else None, writer.response)


class _Writer:
    """Writes one answer."""

    def __init__(self, model: str, prompt: Prompt, body: ResponsesRequest):
        self._model, self._prompt, self._body = model, prompt, body
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._end: Done | None = None
        self._numbers = itertools.count()

    async def response(self, answer: Answer) -> dict[str, Any]:
        async with answer as events:
            text = "".join([piece.text async for piece in pieces(events, self._done)])
        return self._response([self._message(text)])

    async def events(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        part: dict[str, Any] = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=self._response([]))
        yield self._event("response.in_progress", response=self._response([]))
        yield self._event("response.output_item.added", output_index=0, item=self._message(None))
        yield self._event("response.content_part.added", **part, part=_output_text(""))
        text = ""
        async for piece in pieces(events, self._done):
            if piece.text:
                text += piece.text
                yield self._event("response.output_text.delta", **part, delta=piece.text, logprobs=[])
        yield self._event("response.output_text.done", **part, text=text, logprobs=[])
        yield self._event("response.content_part.done", **part, part=_output_text(text))
        yield self._event("response.output_item.done", output_index=0, item=self._message(text))
        kind = "response.completed" if self._status() == "completed" else "response.incomplete"
        yield self._event(kind, response=self._response([self._message(text)]))

    def _event(self, kind: str, **fields: Any) -> str:
        return server_sent({"type": kind, "sequence_number": next(self._numbers), **fields}, event=kind)

    def _done(self, end: Done) -> None:
        self._end = end

    def _status(self) -> str:
        if self._end is None:
            return "in_progress"
        return "completed" if self._end.reason == "stop" else "incomplete"

    def _message(self, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [_output_text(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": self._status(), "content": content}

    def _response(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, status = self._body, self._status()
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": None if self._end is None else self._usage(self._end),
        }

    def _usage(self, end: Done) -> dict[str, Any]:
        asked = self._prompt.length
        return {
            "input_tokens": asked,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": end.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": asked + end.tokens,
        }


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
