"""Tasks of lmms-eval whose answers another model judges over the network, which needs a key."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

JUDGED = ("mmvet", "mmbench_en_dev", "hrbench4k", "hrbench8k")
_KEYS = {"azure": "AZURE_API_KEY"}  # by the variable API_TYPE, as lmms-eval reads it


def missing_key(task: str) -> str | None:
    """Return the environment variable that a task's judge needs and that is not set; None if nothing is missing."""
    variable = _KEYS.get(os.environ.get("API_TYPE", "openai"), "OPENAI_API_KEY")
    return variable if task in JUDGED and not os.environ.get(variable) else None


@contextmanager
def loadable(task: str) -> Iterator[None]:
    """Let a task load without its judge's key, which the code of some asks for when it is imported."""
    variable = missing_key(task)
    if variable is None:
        yield
        return
    os.environ[variable] = "missing"
    try:
        yield
    finally:
        del os.environ[variable]


def unscored(task: str, variable: str) -> str:
    """Return the sentence that says what becomes of a task without the key in an environment variable."""
    return (
        f"the answers to {task} are written unscored, to samples/SYSTEM/{task}.jsonl: its judge needs a key in "
        f"{variable}; set it and rerun the same command to score them"
    )


def no_marks(doc: Mapping[str, Any], results: Sequence[Any], **_: Any) -> dict[str, float]:
    """Return no metric: what `process_results` of a task is that nobody judges."""
    return {}
