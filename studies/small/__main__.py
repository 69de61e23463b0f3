"""The paper's comparison in small, as one command of this repository.

python -m studies.small --photographs DIR --output OUT
"""

from __future__ import annotations

import shlex
import sys

from flexattn_cuda.cli import run_app
from studies.small import run
from studies.small.command_line import command_line
from studies.small.options import StudyOptions


def study(options: StudyOptions) -> None:
    """Train the paper's systems on generated images, compare them and write a report; rerun to resume."""
    command = shlex.join(["python", "-m", "studies.small", *sys.argv[1:]])
    print(run.study(options, command, progress=True))


app = command_line(StudyOptions, study)

if __name__ == "__main__":
    run_app(app, "python -m studies.small")
