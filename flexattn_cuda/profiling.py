"""Ranges that name the operators and the phases of the model in a profiler. Off by default.

`nvtx(True)` or FLEXATTN_NVTX=1 in the environment turns them on. In a build with CUDA they are NVTX ranges in the
domain "flexattn_cuda", for Nsight Systems and Nsight Compute. In any build the phases are also ranges of
torch.profiler, which lists the operators anyway. docs/profiling.md shows the command lines.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch

from flexattn_cuda.native import compiled

DOMAIN = "flexattn_cuda"
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_on = False


def nvtx(on: bool = True) -> None:
    """Turn the ranges on or off for the whole process."""
    global _on
    _on = bool(on)
    compiled.nvtx_switch(_on)


def phase(name: str) -> AbstractContextManager[None]:
    """Return a range of this name for a `with` block; it does nothing while ranges are off and in compiled code."""
    return _range(name) if _on and not torch.compiler.is_compiling() else nullcontext()


def in_phase(name: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Return a decorator that makes every call of a function a phase of this name."""

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(function)
        def call(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
            with phase(name):
                return function(*arguments, **named)

        return call

    return decorate


@contextmanager
def _range(name: str) -> Iterator[None]:
    with torch.profiler.record_function(f"{DOMAIN}.{name}"):
        compiled.nvtx_push(name)
        try:
            yield
        finally:
            compiled.nvtx_pop()


if os.environ.get("FLEXATTN_NVTX", "0") not in ("", "0"):
    nvtx(True)
