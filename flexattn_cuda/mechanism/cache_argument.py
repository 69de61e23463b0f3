"""The key/value cache among the arguments of a call, which transformers renamed in 5.24: `past_key_values` to `cache`.

Callers of this package may use either name with any version; transformers is called with the name that it knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import Cache, GenerationMixin

_NEW_NAME, _OLD_NAME = "cache", "past_key_values"

# What the installed transformers names it.
CACHE_ARGUMENT = (
    _NEW_NAME if _NEW_NAME in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else _OLD_NAME
)


def check_cache_argument(forward: Callable[..., Any]) -> None:
    """Raise ImportError unless a language model takes its cache under the name that this package passes it by.

    HR tokens would otherwise be left out silently, from the second token of an answer on.
    """
    if CACHE_ARGUMENT not in inspect.signature(forward).parameters:
        raise ImportError(
            f"{forward.__qualname__} takes no argument {CACHE_ARGUMENT!r}, and flexattn_cuda does not know what else "
            f"transformers {transformers.__version__} may call its key/value cache; versions 5.0 to 5.24 are tested: "
            "pip install 'transformers<5.25'"
        )


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the key/value cache that a call was given under either name.

    Raises:
        ValueError: If it was given two.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("both cache and past_key_values were given; they are two names of one argument: pass one")
    return past_key_values if cache is None else cache


def rename_cache(arguments: dict[str, Any]) -> Cache | None:
    """Give the key/value cache among the arguments of a call the name that transformers has for it; return it.

    Raises:
        ValueError: If there are two.
    """
    cache = one_cache(arguments.pop(_NEW_NAME, None), arguments.pop(_OLD_NAME, None))
    if cache is not None:
        arguments[CACHE_ARGUMENT] = cache
    return cache
