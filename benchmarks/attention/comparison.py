"""Methods that compute the same thing, and whether each is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from attention.methods import OURS


@dataclass(frozen=True)
class About:
    """What is compared. The fields are columns of the table."""

    name: str
    case: str  # prefill, decode, copy, or an operator's name
    preset: str = ""
    batch: int | None = None
    queries: int | None = None
    keys: int | None = None
    selected: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    dtype: str = ""
    input_sets: int | None = None


@dataclass(frozen=True)
class Errors:
    """Maximum absolute errors, of the output and of the map."""

    out: float
    map: float | None = None


@dataclass
class Comparison:
    """Methods on several sets of inputs, which they go through in turn.

    methods: A call for each set of inputs, by method.
    check: Returns the errors of a method, given its name and its call on the first set. Raises WrongResultError.
    moved: Bytes that must move once.
    unavailable: Why a method cannot be called.
    """

    about: About
    methods: dict[str, list[Callable]]
    check: Callable[[str, Callable], Errors]
    moved: int
    flop: int = 0
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A comparison whose inputs are made when it is built."""

    name: str
    build: Callable[[], Comparison]


class WrongResultError(Exception):
    """A result that rounding does not explain."""


def max_error(name: str, found: torch.Tensor, exact: torch.Tensor, magnitude: float, roundings: float) -> float:
    """Return the maximum absolute error.

    Args:
        magnitude: Size of the values that are rounded.
        roundings: How often they are rounded, by half a unit on either side.

    Raises:
        WrongResultError: The error is larger than this rounding explains, or NaN.
    """
    error = (found.double() - exact).abs().max().item()
    allowed = roundings * torch.finfo(found.dtype).eps * magnitude
    if not error <= allowed:  # NaN is not
        raise WrongResultError(f"{name} is wrong: error {error:.3g}, allowed {allowed:.3g}")
    return error


@dataclass
class Checked:
    """Errors of the methods that can be timed, and why the others cannot."""

    errors: dict[str, Errors] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def check(comparison: Comparison) -> Checked:
    """Call every method once and compare its result with the reference.

    Raises:
        torch.OutOfMemoryError: The GPU's memory is too small for ours or for the reference.
    """
    checked = Checked(reasons=dict(comparison.unavailable))
    for method, calls in comparison.methods.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                checked.errors[method] = comparison.check(method, calls[0])
            except WrongResultError as error:
                checked.reasons[method] = str(error)
            except Exception as error:
                if not may_fail(method, error):
                    raise
                checked.reasons[method] = reason(error) + attention_warning(said)
    return checked


def may_fail(method: str, error: Exception) -> bool:
    """Whether a method that raises is left out, and does not end the benchmark."""
    if isinstance(error, torch.OutOfMemoryError) and method in OURS:  # or in the reference
        return False
    # flex_attention is compiled at its first call, which may raise anything.
    return isinstance(error, (RuntimeError, ValueError)) or method == "flex_attention"


def attention_warning(said: list[warnings.WarningMessage]) -> str:
    """Return torch's first warning that says why a backend does not run."""
    texts = (str(warning.message).split(" (Triggered")[0] for warning in said)
    first = next((text for text in texts if "attention" in text.lower()), "")
    return f" {first}"[:200] if first else ""


def reason(error: BaseException) -> str:
    """Return the first line of an error."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"[:200]
