"""Commands whose options are the fields of a dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

import typer

Options = TypeVar("Options")


def command_line(options: type[Options], run: Callable[[Options], None]) -> typer.Typer:
    """Return an application of one command that runs a function on its options.

    Args:
        options: A dataclass whose fields are annotated with `typer.Option`.
        run: Called with the options given; its docstring is the command's help.
    """

    def command(**values: Any) -> None:
        run(options(**values))

    # typer reads a command's options from its signature: here, the fields of the dataclass.
    annotations = get_type_hints(options, include_extras=True)
    command.__annotations__ = annotations
    command.__signature__ = inspect.Signature(
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=annotations[field.name],
        )
        for field in fields(options)
    )
    command.__doc__ = run.__doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app
