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

STREAM = Path("-")  # standard input or output, as the value of an option that takes it


@dataclass(frozen=True)
class Option:
    """An option, apart from its name, type and default.

    Attributes:
        help: One sentence, starting with a noun or a verb in the imperative.
        flags: Names on the command line; `--field-name` if empty.
        metavar: Placeholder for the value in the help, such as "DIR".
        positional: Whether the command line takes it without a flag.
        choices: The allowed values of a string; any if empty.
        minimum: The lowest allowed number.
        above: A number that the value must exceed.
        below: A number that the value must stay below.
        stream: Whether `-` stands for standard input or output, in place of a path.
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
    stream: bool = False
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
    def is_list(self) -> bool:
        """Whether the option may be repeated: its type is a list."""
        return get_origin(self.type) is list

    @property
    def kind(self) -> type:
        """The type of a value that is not None, or of a list's elements: bool, int, float, str or Path."""
        if self.is_list or isinstance(self.type, types.UnionType):
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
            checked = [_checked(declared, one) for one in value] if declared.is_list else _checked(declared, value)
            object.__setattr__(self, declared.name, checked)

    def fingerprint(self) -> Fingerprint:
        """Return the values that must not change when a run is resumed."""
        fixed = [declared for declared in declared_options(type(self)) if declared.option.fixed]
        return Fingerprint({declared.label: getattr(self, declared.name) for declared in fixed})


def _checked(declared: DeclaredOption, value: Any) -> Any:
    """Return a value of the declared type; raise InputError if it is another or not allowed."""
    if declared.kind is Path:
        if value == "":  # Path("") is the current folder: an empty shell variable would go unnoticed
            raise InputError(f"{declared.label} is empty; it must be a path")
        if value == "-" and not declared.option.stream:  # otherwise a file of that name would be written
            raise InputError(f"{declared.label} is '-', but standard input and output cannot be used; name a path")
        value = _path(value) if isinstance(value, (str, os.PathLike)) else value
    elif declared.kind is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
    problem = _type_problem(declared.kind, value) or _range_problem(declared.option, value)
    if problem is not None:
        raise InputError(f"{declared.label} is {value!r}; {problem}")
    return value


def _path(value: str | os.PathLike[str]) -> Path:
    """Return a path; "./-" is a file, which `Path` alone would turn into STREAM."""
    path = Path(value)
    return path.absolute() if path == STREAM and os.fspath(value) != "-" else path


def _type_problem(kind: type, value: Any) -> str | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int and not (is_number and isinstance(value, int)):
        return "it must be a whole number"
    if kind is float and not (is_number and math.isfinite(value)):
        return "it must be a finite number"
    if kind is bool and not isinstance(value, bool):
        return "it must be True or False"
    if kind in (str, Path) and not isinstance(value, kind):
        return "it must be text" if kind is str else "it must be a path"
    return None


def _range_problem(option: Option, value: Any) -> str | None:
    if option.choices and value not in option.choices:
        return f"allowed: {', '.join(option.choices)}"
    if option.minimum is not None and value < option.minimum:
        return f"it must be at least {option.minimum}"
    if option.above is not None and value <= option.above:
        return f"it must be more than {option.above}"
    if option.below is not None and value >= option.below:
        return f"it must be less than {option.below}"
    return None
