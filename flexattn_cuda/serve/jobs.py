"""One answer that is wanted, and the events that it consists of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flexattn_cuda.serve.errors import RequestError
from flexattn_cuda.serve.images import ServedImage


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    Attributes:
        inputs: input_ids, with all image tokens, and what else the model takes of each position.
        images: The images, in the order of their tokens.
    """

    inputs: dict[str, list[int]]
    images: list[ServedImage]

    @property
    def length(self) -> int:
        """Number of positions."""
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Wanted:
    """How a prompt is to be answered.

    Attributes:
        max_tokens: Maximum length of the answer in tokens.
        stop: Texts that end the answer, and are not part of it.
        hr: Whether the model sees high-resolution tokens.
        trace: Whether to record what it looks at.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    hr: bool = True
    trace: bool = False


@dataclass(frozen=True)
class Piece:
    """A token of the answer.

    Attributes:
        text: What it adds to the answer; perhaps nothing.
        token: What the model looked at for it, in JSON, if that was wanted.
    """

    text: str
    token: dict[str, Any] | None = None


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        reason: "stop", or "length" if the answer was cut.
        tokens: Its length in tokens.
    """

    reason: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The end of an answer that failed."""

    error: RequestError


Event = Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """An answer that is wanted.

    Attributes:
        prompt: What is asked.
        wanted: How it is to be answered.
        emit: Called with each event, by the thread that owns the model; the last is Done or Failed.
        timeout: Seconds that it may take in all.
        started: When the request came, by time.monotonic().
    """

    prompt: Prompt
    wanted: Wanted
    emit: Callable[[Event], None]
    timeout: float
    started: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Tell that nobody waits for the answer any more."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def age(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self.started

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return self.age > self.timeout
