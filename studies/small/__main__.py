"""The paper's comparison in small, as one command of this repository.

python -m studies.small --photographs DIR --output OUT
"""

from __future__ import annotations

import inspect
import shlex
import sys
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import typer

from flexattn_cuda.cli import run_app
from studies.small import run
from studies.small.options import StudyOptions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def study(**options: Any) -> None:
    """Train the paper's systems on generated images, compare them and write a report; rerun to resume."""
    command = shlex.join(["python", "-m", "studies.small", *sys.argv[1:]])
    print(run.study(StudyOptions(**options), command, progress=True))


# typer reads a command's options from its signature: here, the fields of StudyOptions.
study.__annotations__ = get_type_hints(StudyOptions, include_extras=True)
study.__signature__ = inspect.Signature(
    inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if field.default is MISSING else field.default,
        annotation=study.__annotations__[field.name],
    )
    for field in fields(StudyOptions)
)
app.command()(study)


if __name__ == "__main__":
    run_app(app, "python -m studies.small")
