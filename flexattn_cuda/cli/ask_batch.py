"""flexattn ask-batch"""

from __future__ import annotations

import typer

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.runs.files import check_readable
from flexattn_cuda.tasks.options import BatchOptions


def ask_batch(options: BatchOptions) -> None:
    """Answer the questions of a file; rerun the same command to resume after an interruption.

    The exit code is 1 if no question was answered.

    On several GPUs: torchrun --nproc-per-node N -m flexattn_cuda.cli ask-batch ..., or accelerate launch.

    Examples:
        flexattn ask-batch questions.jsonl -o answers.jsonl --batch-size 16
        flexattn ask-batch questions.jsonl -o answers.jsonl --model my-model --restart
        torchrun --nproc-per-node 4 -m flexattn_cuda.cli ask-batch questions.jsonl -o answers.jsonl
    """
    check_readable(options.input)
    silence_transformers()
    from flexattn_cuda.tasks.ask_batch import answer_questions

    if answer_questions(options, progress=True).answers == 0:
        raise typer.Exit(1)
