"""The operators: generated calls against the float64 reference, and calls with damaged arguments."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accuracy import floor
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from operator_arguments import (
    assign_arguments,
    attention_arguments,
    ints,
    project_arguments,
    selection_arguments,
    write_arguments,
)
from strategies import attention_cases, selection_cases, slot_cases, write_cases

from flexattn_cuda import ops, reference
from python_tests.attack.verdicts import Verdict, WrongError
from python_tests.ops import test_ops

VALID_CALLS, DAMAGED_CALLS = 10, 50  # of a case
MOST_WORK = 3e7  # products in a call of attention
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError)  # RuntimeError, ...: torch's own


class ValidOperators:
    """Generated calls, which must give what the reference gives in float64."""

    def __init__(self, folder: Path):
        torch.use_deterministic_algorithms(True)  # outputs are NaN until they are written
        check_attention = test_ops.test_attention.hypothesis.inner_test
        self._checks: list[tuple[Callable[..., None], SearchStrategy]] = [
            *((_on_cpu(check_attention, dtype), attention_cases(most_work=MOST_WORK)) for dtype in DTYPES),
            (_on_cpu(test_ops.check_gradients, torch.float32), attention_cases(gradients=True, small=True)),
            (_on_cpu(test_ops.check_selection), selection_cases()),
            (_on_cpu(test_ops.check_slots), slot_cases()),
            *((_on_cpu(test_ops.check_write, dtype, torch.float32), write_cases()) for dtype in DTYPES),
        ]

    def run(self, number: int, rng: random.Random) -> Counter[Verdict]:
        check, strategy = self._checks[number % len(self._checks)]
        calls = 0

        @seed(rng.randrange(2**62))
        @settings(
            max_examples=VALID_CALLS, phases=[Phase.generate], database=None, deadline=None, derandomize=False,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def call(case: Any) -> None:
            nonlocal calls
            check(case)
            calls += 1

        call()
        return Counter({Verdict.RIGHT: calls})


def _on_cpu(check: Callable[..., None], *types: torch.dtype) -> Callable[[Any], None]:
    return lambda case: check("cpu", *types, case)


def gather_arguments() -> dict[str, Any]:
    return dict(tokens=torch.randn(2, 5, 3), index=ints([[4, -1, 0], [2, 3, 1]]))


def scatter_arguments() -> dict[str, Any]:
    return dict(grad=torch.randn(2, 3, 3), index=ints([[4, -1, 0], [2, 3, 1]]), num_tokens=5)


def map_arguments() -> dict[str, Any]:
    return attention_arguments() | dict(map_ranges=ints([[[0, 9]], [[2, 11]]]), map_size=9, alpha=torch.rand(2))


def scatter(grad: torch.Tensor, index: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The reference of `gather_tokens_backward`."""
    tokens = grad.new_zeros(grad.shape[0], num_tokens, grad.shape[2])
    for row, column in (index >= 0).nonzero().tolist():
        tokens[row, index[row, column]] += grad[row, column]
    return tokens


OPERATORS: tuple[tuple[Callable[..., Any], Callable[..., Any], Callable[[], dict[str, Any]]], ...] = (
    (ops.hierarchical_attention, reference.hierarchical_attention, attention_arguments),
    (ops.hierarchical_attention, reference.hierarchical_attention, map_arguments),
    (ops.select_tokens, reference.select_tokens, selection_arguments),
    (ops.assign_slots, reference.assign_slots, assign_arguments),
    (ops.gather_tokens, reference.gather_tokens, gather_arguments),
    (torch.ops.flexattn_cuda.gather_tokens_backward, scatter, scatter_arguments),
    (ops.project_hr_kv, reference.project_hr_kv, project_arguments),
    (ops.write_hr_kv, reference.write_hr_kv, write_arguments),
)


class DamagedOperators:
    """Calls with one or two damaged arguments: refused, or as the reference."""

    def __init__(self, folder: Path):
        torch.use_deterministic_algorithms(True)

    def run(self, number: int, rng: random.Random) -> Counter[Verdict]:
        torch.manual_seed(rng.randrange(2**31))
        operator, definition, arguments = OPERATORS[number % len(OPERATORS)]
        return Counter(_call(operator, definition, arguments(), rng) for _ in range(DAMAGED_CALLS))


def _call(operator: Any, definition: Any, arguments: dict[str, Any], rng: random.Random) -> Verdict:
    names = rng.sample(sorted(arguments), rng.choice((1, 1, 2)))
    for name in names:
        arguments[name] = damaged(arguments[name], rng)
    if rng.random() < 0.1:
        del arguments[rng.choice(sorted(arguments))]
    exact = {name: _exact(value) for name, value in arguments.items()}
    try:
        found = operator(**arguments)
    except REFUSALS as error:
        if type(error) is ValueError and "\n" in str(error):
            raise
        return Verdict.REFUSED
    shown = f"{operator} with {', '.join(f'{name} {_shown(arguments.get(name))}' for name in names)}"
    try:
        expected = definition(**exact)
    except Exception as error:
        raise WrongError(f"the reference raises {error!r}: {shown}") from error
    written = [(arguments[name], exact[name]) for name in ("k_pool", "v_pool", "table", "next_free") if name in exact]
    for one, two in [*zip(_tensors(found), _tensors(expected)), *written]:
        if not _alike(one, two):
            raise WrongError(f"{_shown(one)} is not {_shown(two)}: {shown}")
    return Verdict.RIGHT


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    first = value.to_dense().flatten()[:6].tolist()
    return f"{value.dtype} {list(value.shape)} {list(value.stride())} {first}"


def _exact(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.is_sparse:
        return value
    copied = value.resolve_neg().clone()
    return copied.double() if copied.is_floating_point() else copied


def _tensors(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found or ())


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found.long(), expected.long())
    finite = expected.isfinite() & found.isfinite()  # where a NaN shows is for python_tests/ops to say
    error = (found.double() - expected)[finite].abs().max().item() if finite.any() else 0.0
    largest = expected[finite].abs().max().item() if finite.any() else 0.0
    return error <= 8 * floor(found.dtype, max(1.0, largest))


INTEGERS = (-(2**31), -2, -1, 0, 1, 2, 7, 2**31 - 1)
NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 3.0)
SCALARS = (None, True, "word", -1, 0, 1, 2**31, 2**40, 2**62, -(2**62), 1e-30, *NUMBERS)


def damaged(value: Any, rng: random.Random) -> Any:
    """Return an argument of another value, shape, layout or type."""
    if not isinstance(value, torch.Tensor):
        return rng.choice(SCALARS)
    values = NUMBERS if value.is_floating_point() else INTEGERS
    match rng.randrange(10):
        case 0:
            return value.to(rng.choice((torch.int64, torch.int32, torch.bool, torch.float64, torch.float16)))
        case 1:
            at = rng.randrange(value.ndim + 1)
            return (
                value.unsqueeze(at)
                if rng.random() < 0.5 or value.ndim == 0
                else value.select(min(at, value.ndim - 1), 0)
            )
        case 2:
            at = rng.randrange(value.ndim)
            return torch.cat([value, value.narrow(at, 0, 1)], at) if rng.random() < 0.5 else value.narrow(at, 0, 0)
        case 3:
            return value.narrow(rng.randrange(value.ndim), 0, 1).expand_as(value)  # elements that share memory
        case 4:
            return value.transpose(0, -1).contiguous().transpose(0, -1)
        case 5:
            return torch._neg_view(value) if value.is_floating_point() else value.flip(-1)
        case 6:
            return value.to_sparse()
        case 7:
            return torch.full_like(value, rng.choice(values))
        case _:
            changed = value.clone()
            changed.view(-1)[rng.randrange(max(1, changed.numel()))] = rng.choice(values)
            return changed
