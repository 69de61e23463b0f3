"""The journals of `flexattn ask-batch`: a record for each answer, with the number of its question and the version of
its image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.runs import journal
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.journal import JournalKind
from flexattn_cuda.runs.versions import FileVersion
from flexattn_cuda.tasks.ask_batch.lines import Result, Results

KIND = JournalKind("journal of flexattn ask-batch", 2)


class Journal(journal.Journal):
    """A journal that is open for writing."""

    def __init__(self, path: Path, fingerprint: Fingerprint):
        super().__init__(path, KIND, fingerprint)

    def append_results(self, results: Results) -> None:
        """Write the answers among some results to the disk; a line that failed is tried again by the next run."""
        self.append(_fields(number, result) for number, result in results.items() if result.answer is not None)


@dataclass(frozen=True)
class Journalled:
    """What a journal holds: the answers, and the number of lines that were damaged."""

    answers: Results
    damaged: int


def read_journal(path: Path, fingerprint: Fingerprint) -> Journalled:
    """Return the answers of a journal, see `runs.journal.read_journal`."""
    found = journal.read_journal(path, KIND, fingerprint)
    answers = {
        record["line"]: Result(record["answer"], image=record["image"] and FileVersion(*record["image"]))
        for record in found.records
    }
    return Journalled(answers, found.damaged)


def _fields(number: int, result: Result) -> dict[str, Any]:
    return {"line": number, "answer": result.answer, "image": result.image}
