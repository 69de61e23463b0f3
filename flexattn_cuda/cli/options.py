"""Options classes as command lines."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
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
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(declared: DeclaredOption) -> inspect.Parameter:
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if declared.default is dataclasses.MISSING else declared.default,
        annotation=Annotated[declared.type, _typer_parameter(declared)],
    )


def _typer_parameter(declared: DeclaredOption) -> Any:
    option = declared.option
    has_default = declared.default is not dataclasses.MISSING
    shared = {"help": option.help, "metavar": option.metavar, "show_default": has_default}
    if option.positional:
        return typer.Argument(**shared)
    # A flag that is named has no --no-... beside it.
    return typer.Option(*(option.flags or (f"--{declared.name.replace('_', '-')}",)), **shared)
