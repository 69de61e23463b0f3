"""One model that is served: from messages to the events of an answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import anyio

from flexattn_cuda.inputs.hr_processor import HRProcessor
from flexattn_cuda.serve.engine import Engine
from flexattn_cuda.serve.errors import RequestError
from flexattn_cuda.serve.images import ImageCache
from flexattn_cuda.serve.jobs import Done, Event, Failed, Job, Prompt, Wanted
from flexattn_cuda.serve.metrics import Metrics
from flexattn_cuda.serve.prompts import Message, PromptReader
from flexattn_cuda.serve.schemas import Extension
from flexattn_cuda.serve.sources import Sources
from flexattn_cuda.tasks.models import HRModel, TrainingProcessor
from flexattn_cuda.tasks.options import ServeOptions

MIB = 1 << 20


@dataclass
class Service:
    """A model that is served.

    Attributes:
        model: The model, which only the engine runs.
        processor: Its processor.
        options: Of the server.
        name: Of the model in the API.
    """

    model: HRModel
    processor: TrainingProcessor
    options: ServeOptions
    name: str
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        options = self.options
        self.cache = ImageCache(int(options.image_cache * MIB))
        self.engine = Engine(self.model, self.processor, self.cache, options.batch_size, self.metrics)
        sources = Sources(int(options.max_request * MIB), options.files, options.allow_urls, options.allow_private_urls)
        self.reader = PromptReader(
            self.model, self.processor, sources, self.cache, int(options.max_megapixels * 1_000_000)
        )
        self.metrics.watch("waiting", "Requests that are not begun", lambda: self.engine.waiting)
        self.metrics.watch("image_cache_bytes", "Size of the images that are kept", lambda: self.cache.size)
        self._threads, self._downloads = anyio.CapacityLimiter(8), anyio.CapacityLimiter(8)

    @cached_property
    def layers(self) -> list[int]:
        """Layers with a map: the one before the first that attends to HR tokens, and later ones."""
        settings = self.model.flexattn_settings
        if settings is None or settings.system != "flexattn":
            return []
        return list(range(settings.first_layer - 1, self.model.config.get_text_config().num_hidden_layers))

    @property
    def can_leave_hr_out(self) -> bool:
        """Whether the model can answer from the low-resolution image alone."""
        settings = self.model.flexattn_settings
        return settings is not None and settings.system != "hd"

    def card(self) -> dict[str, Any]:
        """Return the entry of the model in /v1/models."""
        settings = None if isinstance(self.processor, HRProcessor) else self.model.flexattn_settings
        extension = {
            "layers": self.layers,
            "compare": self.can_leave_hr_out,
            "lowres_size": None if settings is None else settings.lowres_size,
            "max_tokens": self.options.max_new_tokens,
            "max_request_mib": self.options.max_request,
        }
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "flexattn_cuda",
            "flexattn": extension,
        }

    async def prompt(self, model: str, messages: Sequence[Message], extension: Extension) -> Prompt:
        """Return the prompt of a request.

        Raises:
            RequestError: If the request cannot be answered.
        """
        if model != self.name:
            raise RequestError(
                f"the model {model[:100]!r} is not served here; this server has {self.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )
        if not extension.hr and not self.can_leave_hr_out:
            raise RequestError("this model cannot leave high-resolution tokens out; leave out flexattn.hr")
        waits = any(url[:4].lower() == "http" for message in messages for url in message.images)
        limiter = self._downloads if waits else self._threads  # slow servers elsewhere hold up only each other
        prompt = await anyio.to_thread.run_sync(self.reader.read, messages, limiter=limiter)
        if extension.trace and not (self.layers and extension.hr and prompt.images):
            raise RequestError("there is nothing to trace without an image and high-resolution tokens; leave trace out")
        return prompt

    def wanted(self, prompt: Prompt, limit: int | None, stop: Sequence[str], extension: Extension) -> Wanted:
        """Return how a prompt is to be answered.

        Raises:
            RequestError: If more tokens are asked for than the server allows.
        """
        allowed = self.options.max_new_tokens
        if limit is not None and limit > allowed:
            raise RequestError(f"the request asks for {limit} tokens; this server allows at most {allowed}")
        tokens = min(allowed if limit is None else limit, self.reader.room(prompt))
        return Wanted(tokens, tuple(stop), extension.hr, extension.trace)

    @contextlib.asynccontextmanager
    async def answer(self, prompt: Prompt, wanted: Wanted, started: float) -> AsyncIterator[AsyncIterator[Event]]:
        """Answer a prompt: a context of the events, at whose end the answer is cancelled if it is not finished.

        The first event has come when the context begins, so that an answer that fails at once is no answer.

        Raises:
            RequestError: If it fails before its first event.
        """
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(heard.put_nowait, event)

        job = Job(prompt, wanted, emit, self.options.timeout, started)
        self.engine.submit(job)
        try:
            first = await heard.get()
            self.metrics.first_token_seconds.observe(job.age)
            if isinstance(first, Failed):
                raise first.error
            yield _until_the_end(first, heard)
        finally:
            job.cancel()


async def _until_the_end(event: Event, heard: asyncio.Queue[Event]) -> AsyncIterator[Event]:
    yield event
    while not isinstance(event, Done | Failed):
        event = await heard.get()
        yield event
