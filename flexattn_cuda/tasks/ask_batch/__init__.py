"""Answer a file of questions in batches, on one device or on many, and resume after interruptions.

    questions.jsonl ─ checked, sorted by prompt length, cut into batches that are dealt to the processes
        ─► answers.jsonl.partial.RANK  a journal per process, flushed to the disk after every batch
        ─► answers.jsonl               in the order of the questions, in one step, when all are answered

One question about a folder of images takes the same batches, without files: `answer_folder`.

A run that was interrupted, in whatever way, is resumed from the journals of all processes, however many there were.
"""

from flexattn_cuda.tasks.ask_batch.answers import BatchModel
from flexattn_cuda.tasks.ask_batch.folder import answer_folder
from flexattn_cuda.tasks.ask_batch.lines import Totals
from flexattn_cuda.tasks.ask_batch.run import answer_file, answer_questions
from flexattn_cuda.tasks.options import BatchOptions

__all__ = ["BatchModel", "BatchOptions", "Totals", "answer_file", "answer_folder", "answer_questions"]
