"""Answers as HTTP responses: server-sent events, or one JSON object."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from flexattn_cuda.serve.errors import RequestError
from flexattn_cuda.serve.jobs import Done, Event, Failed, Piece

Answer = AbstractAsyncContextManager[AsyncIterator[Event]]
T = TypeVar("T")
CLIENT_GONE = 499  # as nginx counts it; nobody reads the response


def server_sent(data: dict[str, Any], event: str | None = None) -> str:
    """Return one server-sent event."""
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


Write = Callable[[AsyncIterator[Event]], AsyncIterator[str]]
"""Turns the events of an answer into server-sent events."""


async def respond_with(
    request: Request, answer: Answer, write: Write | None, whole: Callable[[Answer], Awaitable[dict[str, Any]]]
) -> Response:
    """Return the response that streams an answer by `write`, or the one that holds the `whole` of it."""
    if write is not None:
        return await streamed(request, answer, write)
    content = await unless_disconnected(request, whole(answer))
    return Response(status_code=CLIENT_GONE) if content is None else JSONResponse(content)


async def streamed(request: Request, answer: Answer, write: Write) -> Response:
    """Return the response that streams an answer; an answer that fails later ends with an event that says so.

    Args:
        request: Of a client that may go away before the answer begins.
        answer: As `Service.answer` returns it.
        write: Turns its events into server-sent events.
    """
    stack = contextlib.AsyncExitStack()
    events = await unless_disconnected(request, stack.enter_async_context(answer))
    if events is None:
        return Response(status_code=CLIENT_GONE)

    async def body() -> AsyncIterator[str]:
        async with stack:
            try:
                async for text in write(events):
                    yield text
            except RequestError as error:
                yield server_sent(error.body())

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def pieces(events: AsyncIterator[Event], done: Callable[[Done], None]) -> AsyncIterator[Piece]:
    """Yield the pieces of an answer, and pass its end on.

    Raises:
        RequestError: If it fails.
    """
    async for event in events:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            done(event)
        else:
            yield event


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T | None:
    """Return the result of some work, which is cancelled if the client goes away; None then."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
