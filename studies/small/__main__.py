"""The paper's comparison in small, as one command of this repository.

python -m studies.small --photographs DIR --output OUT
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from flexattn_cuda.cli import run_app, silence_transformers
from flexattn_cuda.errors import InputError
from studies.small import run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def study(
    photographs: Annotated[
        list[Path],
        typer.Option(
            metavar="DIR",
            help="A folder of JPEG photographs, the backgrounds; may be repeated.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Models and results.", show_default=False),
    ],
    preset: Annotated[str, typer.Option(help="small, or tiny: minutes, to see that it runs.")] = "small",
    seeds: Annotated[str, typer.Option(help="Numbers, such as 0,1,2.")] = "0,1,2",
    systems: Annotated[str, typer.Option(help="all, or names, such as llava,flexattn.")] = "all",
    jobs: Annotated[
        int | None,
        typer.Option(help="Processes at a time, of one thread each; by default one for each core."),
    ] = None,
    examples: Annotated[
        str | None,
        typer.Option(help="Questions that the report shows, by their numbers in answers.csv."),
    ] = None,
) -> None:
    """Train the paper's systems on generated images, compare them, and write the tables; called again, it goes on."""
    numbers = _number_list(seeds, "--seeds")
    shown = None if examples is None else _number_list(examples, "--examples")
    chosen = run.SYSTEMS if systems == "all" else systems.split(",")
    command = " ".join(["python", "-m", "studies.small", *map(shlex.quote, sys.argv[1:])])
    report = run.study(output, photographs, preset, numbers, chosen, jobs, command, progress=True, examples=shown)
    print(report)


def _number_list(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} is {text!r}; it takes numbers, such as 0,1,2") from None


if __name__ == "__main__":
    silence_transformers()
    run_app(app, "python -m studies.small")
