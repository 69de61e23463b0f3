"""Exceptions at every line of the mechanism, as Ctrl-C, a hook or a full memory raises them.

What a call has left in the cache is refused from then on, or right. Memory that was not written is NaN here.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import tiny
import torch
from transformers import DynamicCache

from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from python_tests.attack.verdicts import Verdict, WrongError

TRACED = ("/flexattn_cuda/", "/transformers/models/llama/", "/transformers/cache_utils.py")
ERRORS = (KeyboardInterrupt, MemoryError, RuntimeError)


class Interrupts:
    """A conversation of five calls, one of which is interrupted."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
        second = {"input_ids": tiny.prompt(3, "image", 6, seed=4)[None], "pixel_values_hr": tiny.images(1, 4)}
        token = {"input_ids": torch.tensor([[5]])}
        self._calls: list[dict[str, torch.Tensor]] = [tiny.image_question(), token, token, second, token]
        self._models = [tiny.flex(settings) for settings in tiny.PRESETS.values()]
        self._expected = [self._conversation(model) for model in self._models]
        self._lines = [[self._count(model, at) for at in range(len(self._calls))] for model in self._models]

    def run(self, number: int, rng: random.Random) -> Verdict:
        which, at = number % len(self._models), number // 2 % len(self._calls)
        model, expected = self._models[which], self._expected[which]
        line = rng.randrange(self._lines[which][at])
        cache = self._cache_after(model, at)
        before = cache.get_seq_length()
        try:
            with _traced(_raise_at(line, ERRORS[number % len(ERRORS)])):
                self._call(model, self._calls[at], cache)
        except ERRORS:
            pass
        again = at if cache.get_seq_length() == before else at + 1
        verdict = Verdict.RIGHT
        if again < len(self._calls):
            try:
                if not torch.equal(self._call(model, self._calls[again], cache), expected[again]):
                    raise WrongError(f"call {again} differs after an interrupt at line {line} of call {at}")
            except ValueError as error:
                if "start again with a new cache" not in str(error):
                    raise
                verdict = Verdict.REFUSED
        if not all(map(torch.equal, self._conversation(model), expected)):
            raise WrongError(f"a new conversation differs after an interrupt at line {line} of call {at}")
        return verdict

    @torch.no_grad()
    def _call(self, model: Any, call: dict[str, torch.Tensor], cache: DynamicCache) -> torch.Tensor:
        return model(**call, **{CACHE_ARGUMENT: cache}).logits

    def _cache_after(self, model: Any, calls: int) -> DynamicCache:
        cache = DynamicCache(config=model.config.text_config)
        for call in self._calls[:calls]:
            self._call(model, call, cache)
        return cache

    def _conversation(self, model: Any) -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config.text_config)
        return [self._call(model, call, cache) for call in self._calls]

    def _count(self, model: Any, at: int) -> int:
        cache, lines = self._cache_after(model, at), [0]

        def count() -> None:
            lines[0] += 1

        with _traced(count):
            self._call(model, self._calls[at], cache)
        return lines[0]


def _raise_at(line: int, error: type[BaseException]) -> Callable[[], None]:
    left = iter(range(line))

    def step() -> None:
        if next(left, None) is None:
            sys.settrace(None)
            raise error

    return step


@contextmanager
def _traced(step: Callable[[], None]) -> Iterator[None]:
    """Call a function at every line of the files that are traced."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            return trace if any(part in frame.f_code.co_filename for part in TRACED) else None
        if event == "line":
            step()
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)
