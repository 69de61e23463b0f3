"""The paper's comparison in small, as one command of this repository.

python -m studies.small --photographs DIR --output OUT
"""

from __future__ import annotations

import shlex
import sys

import typer

from flexattn_cuda.cli import as_command, run_app, silence_transformers
from studies.small import run
from studies.small.options import StudyOptions


def study(options: StudyOptions) -> None:
    """Train the paper's systems on generated images, compare them and write a report; rerun to resume."""
    silence_transformers()
    command = shlex.join(["python", "-m", "studies.small", *sys.argv[1:]])
    print(run.study(options, command, progress=True))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(as_command(study))

if __name__ == "__main__":
    run_app(app, "python -m studies.small")
