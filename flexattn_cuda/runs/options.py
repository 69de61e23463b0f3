"""Options that are declared once.

A dataclass whose fields are annotated with `Option` is the Python interface of a task, its command line
(`flexattn_cuda.cli.options`), the check of its values, the fingerprint that a resumed run is compared with, and the
documentation of all of these:

    @dataclass(frozen=True, kw_only=True)
    class GreetOptions(Options):
        name: Annotated[str, Option("Who to greet.", positional=True)]
        times: Annotated[int, Option("Number of greetings.", minimum=1)] = 1

This module imports nothing heavy, so that a command line can be built from such classes at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.fingerprint import Fingerprint


@dataclass(frozen=True)
class Option:
    """What is known of an option besides its name, its type and its default.

    Attributes:
        help: One sentence, starting with a noun or a verb in the imperative.
        flags: Names on the command line; `--field-name` if empty.
        metavar: What stands for the value in the help, such as "DIR".
        positional: Whether the command line takes it without a flag.
        choices: The allowed values of a string; any if empty.
        minimum: The lowest allowed number.
        above: A number that the value must exceed.
        below: A number that the value must stay below.
        fixed: Whether a run can only be resumed with the value that it was started with.
    """

    help: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    positional: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    below: float | None = None
    fixed: bool = False


@dataclass(frozen=True)
class DeclaredOption:
    """A field of an options class.

    Attributes:
        type: The annotated type, such as `int | None`.
        default: Its default, or `dataclasses.MISSING` if the option is required.
    """

    name: str
    type: Any
    default: Any
    option: Option

    @property
    def label(self) -> str:
        """The name in a sentence."""
        return self.name.replace("_", " ")

    @property
    def kind(self) -> type:
        """The type of a value that is not None: bool, int, float, str or Path."""
        if isinstance(self.type, types.UnionType):
            return next(one for one in get_args(self.type) if one is not types.NoneType)
        return self.type


@functools.cache
def declared_options(options: type) -> tuple[DeclaredOption, ...]:
    """Return the options that a class declares, in the order of its fields."""
    hints = get_type_hints(options, include_extras=True)
    declared = []
    for field in dataclasses.fields(options):
        if get_origin(hints[field.name]) is not Annotated:
            raise TypeError(f"{options.__name__}.{field.name} is not annotated with an Option")
        kind, option = get_args(hints[field.name])
        declared.append(DeclaredOption(field.name, kind, field.default, option))
    return tuple(declared)


class Options:
    """Base of the options classes: values are checked when an object is made.

    Paths may be given as strings, and strings as paths.

    Raises:
        InputError: If a value is not allowed.
    """

    def __post_init__(self) -> None:
        for declared in declared_options(type(self)):
            value = getattr(self, declared.name)
            if value is None and declared.default is None:
                continue
            object.__setattr__(self, declared.name, _checked(declared, value))

    def fingerprint(self) -> Fingerprint:
        """Return the values that must not change when a run is resumed."""
        fixed = [declared for declared in declared_options(type(self)) if declared.option.fixed]
        return Fingerprint({declared.label: getattr(self, declared.name) for declared in fixed})


def _checked(declared: DeclaredOption, value: Any) -> Any:
    if declared.kind is Path:
        return Path(value)
    if declared.kind is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        _check_choice(declared, value)
    elif declared.kind in (int, float):
        _check_number(declared, value)
    return value


def _check_choice(declared: DeclaredOption, value: Any) -> None:
    choices = declared.option.choices
    if choices and value not in choices:
        raise InputError(f"{declared.label} is {value!r}; allowed: {', '.join(choices)}")


def _check_number(declared: DeclaredOption, value: Any) -> None:
    option = declared.option
    problem = None
    if isinstance(value, bool) or not isinstance(value, (int, declared.kind)):
        problem = "a whole number" if declared.kind is int else "a number"
    elif not math.isfinite(value):
        problem = "a finite number"
    elif option.minimum is not None and value < option.minimum:
        problem = f"at least {option.minimum}"
    elif option.above is not None and value <= option.above:
        problem = f"more than {option.above}"
    elif option.below is not None and value >= option.below:
        problem = f"less than {option.below}"
    if problem is not None:
        raise InputError(f"{declared.label} is {value}; it must be {problem}")
