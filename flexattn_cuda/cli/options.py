"""Options classes as command lines."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from flexattn_cuda.runs.options import DeclaredOption, declared_options


def as_command(run: Callable[..., None]) -> Callable[..., None]:
    """Turn a function of one options class into a function of its fields, as typer needs it.

    Args:
        run: Takes a single parameter, annotated with a subclass of `flexattn_cuda.runs.options.Options`. Its name and
            docstring become those of the command.
    """
    [name] = inspect.signature(run).parameters
    options = get_type_hints(run)[name]

    def command(**values: Any) -> None:
        run(options(**values))

    parameters = [_parameter(declared) for declared in declared_options(options)]
    command.__name__, command.__doc__ = run.__name__, _without_line_breaks(_parts(run)[0])
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def examples_of(run: Callable[..., None]) -> list[str]:
    """Return the lines below "Examples:" at the end of a command's docstring, which `as_command` leaves out."""
    return [line.strip() for line in _parts(run)[1].splitlines()]


def _parts(run: Callable[..., None]) -> tuple[str, str]:
    text, _, examples = (inspect.getdoc(run) or "").partition("\n\nExamples:\n")
    return text, examples


def _without_line_breaks(text: str) -> str:
    """Join the lines of each paragraph: typer keeps the breaks of all but the first."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _parameter(declared: DeclaredOption) -> inspect.Parameter:
    default = str(declared.default) if isinstance(declared.default, Path) else declared.default
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
        annotation=Annotated[_typer_type(declared), _typer_parameter(declared)],
    )


def _typer_type(declared: DeclaredOption) -> Any:
    """Return the declared type, with text for paths: typer would turn an empty one into the current folder."""
    if declared.kind is not Path:
        return declared.type
    return list[str] if declared.is_list else str | None if declared.default is None else str


def _typer_parameter(declared: DeclaredOption) -> Any:
    option = declared.option
    has_default = declared.default is not dataclasses.MISSING
    shared: dict[str, Any] = {"help": option.help, "metavar": option.metavar, "show_default": has_default}
    if option.choices:
        shared["autocompletion"] = _completion(option.choices)
    if option.positional:
        return typer.Argument(**shared)
    # A flag that is named has no --no-... beside it.
    return typer.Option(*(option.flags or (f"--{declared.name.replace('_', '-')}",)), **shared)


def _completion(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return what completes a value in the shell, as typer calls it."""

    def complete(incomplete: str) -> list[str]:
        return [one for one in choices if one.startswith(incomplete)]

    return complete
