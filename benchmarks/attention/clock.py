"""Seconds of a call on the GPU's own clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def nothing() -> None:
    pass


@dataclass
class PreparedCall:
    """A call, and what must be done before each time that it is made, outside of the time."""

    function: Callable[[], Any]
    before: Callable[[], None] = nothing

    def __call__(self) -> Any:
        self.before()
        return self.function()


class EventClock:
    """Time a call by CUDA events, with a cold L2 cache and without the time that queueing it takes."""

    MAX_READS = 64

    def __init__(self, bytes_read: int = 2**29):
        # Read and not written, so that nothing is written back while a call runs.
        self.buffer = torch.zeros(bytes_read // 4, device="cuda")

    def __call__(self, call: Callable[[], Any]) -> float:
        prepared = call if isinstance(call, PreparedCall) else PreparedCall(call)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        reads = 1
        while True:
            prepared.before()
            for _ in range(reads):
                self.buffer.sum()
            start.record()
            prepared.function()
            end.record()
            waited = start.query()  # the GPU reached the call before all of it was queued
            end.synchronize()
            if not waited or reads == self.MAX_READS:
                return start.elapsed_time(end) * 1e-3
            reads *= 2
