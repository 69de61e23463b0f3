"""flexattn ask-batch"""

from __future__ import annotations

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.tasks.options import BatchOptions


def ask_batch(options: BatchOptions) -> None:
    """Answer the questions of a file; rerun the same command to resume after an interruption.

    On several GPUs: torchrun --nproc-per-node N -m flexattn_cuda.cli ask-batch ..., or accelerate launch.
    """
    silence_transformers()
    from flexattn_cuda.tasks.ask_batch import answer_questions

    answer_questions(options, progress=True)
