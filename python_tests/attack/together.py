"""Threads against serial calls, and long runs against growth."""

from __future__ import annotations

import gc
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import question_files
import tiny_checkpoint
import torch

from flexattn_cuda.tasks.ask import ask
from flexattn_cuda.tasks.load import load
from python_tests.attack.verdicts import Verdict, WrongError

THREADS, QUESTIONS = 4, 60
MAX_GROWTH = 16 << 20  # bytes over QUESTIONS; a cache that were kept would take more


class Threads:
    """One model that several threads ask at a time."""

    def __init__(self, folder: Path):
        self._loaded = load(tiny_checkpoint.save(folder / "model"), "cpu")

    def run(self, number: int, rng: random.Random) -> Verdict:
        asked = [(question_files.image(seed=rng.randrange(99)), "why" * rng.randint(1, 9)) for _ in range(8)]

        def answer(one: tuple[object, str]) -> list[int]:
            torch.set_num_threads(1)
            return ask(*self._loaded, one[0], one[1], max_new_tokens=6).tokens

        serial = list(map(answer, asked))
        with ThreadPoolExecutor(THREADS) as threads:
            together = list(threads.map(answer, asked))
        if serial != together:
            raise WrongError(f"alone {serial}, together {together}")
        return Verdict.RIGHT


class Growth:
    """Many questions, whose memory must be given back."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        self._loaded = load(tiny_checkpoint.save(folder / "model"), "cpu")

    def run(self, number: int, rng: random.Random) -> Verdict:
        self._ask(QUESTIONS, rng)
        before = _resident()
        self._ask(QUESTIONS, rng)
        if (grown := _resident() - before) > MAX_GROWTH:
            raise WrongError(f"{QUESTIONS} questions have left {grown} bytes")
        return Verdict.RIGHT

    def _ask(self, count: int, rng: random.Random) -> None:
        for _ in range(count):
            ask(
                *self._loaded,
                question_files.image(seed=rng.randrange(99)),
                "why" * rng.randint(1, 30),
                max_new_tokens=4,
            )
        gc.collect()


def _resident() -> int:
    """Return the bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
