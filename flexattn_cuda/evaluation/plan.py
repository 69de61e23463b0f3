"""Which questions are answered together, and which journal remembers them.

    questions ─ those about the same images side by side ─► chunks of a few images, dealt to the processes
              ─ sorted by length ─► batches, each of which is one line of a journal

The plan follows from the questions and the size of a batch alone. So a run that was killed, and one with more
processes, computes the same batches, and its results are the same to the last bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.journal import Journal, JournalKind, journal_path, journal_paths, read_journal
from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.runs.progress import Progress

KIND = JournalKind("journal of flexattn eval", 1)
IMAGES_OF_A_CHUNK = 16  # are kept encoded at a time: 16 x 47 MB for LLaVA-7B with 1008 pixels in float16

Batch = list[int]  # numbers of questions
Chunk = list[Batch]
Key = tuple[Any, ...]  # what names a request: task, split, number of the document, number of the request about it


@dataclass(frozen=True)
class Asked:
    """What the plan must know of a question.

    Attributes:
        key: Its name in the journal.
        alike: Those of a batch have this in common.
        text: What is asked, and the answer that is scored.
        images: Hashes of its images.
    """

    key: Key
    alike: Hashable
    text: str
    images: tuple[str, ...]

    @property
    def length(self) -> int:
        """Of the text, in characters."""
        return len(self.text)


@dataclass(frozen=True)
class Outcome:
    """What became of a question.

    Attributes:
        result: The answer, or the score of one.
        seconds: Its share of the time that its batch took.
        text_tokens: Tokens of the prompt besides the images'.
        selected: HR tokens that a layer selected, on average; None if the system selects none.
        tiles: Tiles that hold a selected token.
        images: Images that were encoded for its batch, at the first of its questions.
    """

    result: Any
    seconds: float
    text_tokens: int
    selected: float | None = None
    tiles: int | None = None
    images: int = 0


def cut(asked: Sequence[Asked], batch_size: int) -> list[Chunk]:
    """Cut questions into chunks of a few images, and these into batches of similar length, the longest first."""
    chunks: list[Chunk] = []
    for alike in dict.fromkeys(one.alike for one in asked):
        about: dict[tuple[str, ...], list[int]] = {}
        for number, one in enumerate(asked):
            if one.alike == alike:
                about.setdefault(one.images, []).append(number)
        groups = sorted(about.values(), key=lambda own: -max(asked[number].length for number in own))
        size = max(IMAGES_OF_A_CHUNK, batch_size)
        for start in range(0, len(groups), size):
            numbers = [number for own in groups[start : start + size] for number in own]
            numbers.sort(key=lambda number: -asked[number].length)
            chunks.append([numbers[begin : begin + batch_size] for begin in range(0, len(numbers), batch_size)])
    return chunks


class Runner:
    """Has batches answered: those of this process, in a run without a journal.

    Attributes:
        outcomes: What became of each request so far.
    """

    def __init__(self, show: bool = True) -> None:
        self.outcomes: dict[Key, Outcome] = {}
        self._show = show

    def run(
        self, asked: Sequence[Asked], chunks: Sequence[Chunk], answer: Callable[[Batch], list[Outcome]], what: str
    ) -> list[Outcome]:
        """Return what becomes of each question.

        Args:
            asked: The questions.
            chunks: As `cut` returns them.
            answer: Answers a batch.
            what: The name of what is counted, in the plural.
        """
        self._answer(asked, chunks, answer, Progress(len(asked), what, enabled=self._show))
        return [self.outcomes[one.key] for one in asked]

    def _answer(
        self,
        asked: Sequence[Asked],
        chunks: Sequence[Chunk],
        answer: Callable[[Batch], list[Outcome]],
        progress: Progress,
    ) -> None:
        with progress:
            for batch in (batch for chunk in chunks for batch in chunk):
                keys = [asked[number].key for number in batch]
                self._keep(keys, answer(batch))
                progress.advance(len(batch))

    def _keep(self, keys: Sequence[Key], outcomes: Sequence[Outcome]) -> None:
        self.outcomes.update(zip(keys, outcomes))


class JournalledRunner(Runner):
    """Has the batches of several processes answered that no journal of an earlier run holds.

    Args:
        processes: Which share the questions.
        output: What the journals are named after.
        fingerprint: What a resumed run must repeat, beside the questions.
        name: Of the run, in progress.
        show: Print progress, in process 0.
    """

    def __init__(self, processes: Processes, output: Path, fingerprint: Fingerprint, name: str, show: bool):
        super().__init__(show and processes.rank == 0)
        self._processes, self._output, self._fingerprint, self._name = processes, output, fingerprint, name
        self._journal: Journal | None = None

    def run(
        self, asked: Sequence[Asked], chunks: Sequence[Chunk], answer: Callable[[Batch], list[Outcome]], what: str
    ) -> list[Outcome]:
        """As in `Runner`; every process returns what became of all questions."""
        what = f"{self._name}: {what}"
        questions = repr([(one.key, one.text, one.images) for one in asked]).encode()
        fingerprint = self._fingerprint.with_facts(questions=hashlib.blake2b(questions, digest_size=16).hexdigest())
        self.outcomes |= self._processes.broadcast_from_rank0(lambda: self._earlier(fingerprint))
        keys = [one.key for one in asked]
        left = [[batch for batch in chunk if any(keys[n] not in self.outcomes for n in batch)] for chunk in chunks]
        share = [chunk for chunk in left if chunk][self._processes.rank :: self._processes.count]
        total = sum(len(batch) for chunk in share for batch in chunk)
        progress = Progress(total, what, enabled=self._show)
        if total < len(asked):
            progress.say(f"{what}: {total} of {len(asked)} are left to this process")
        with ExitStack() as stack:
            if share:
                path = journal_path(self._output, self._processes.rank)
                self._journal = stack.enter_context(Journal(path, KIND, fingerprint))
            self._answer(asked, share, answer, progress)
        parts = self._processes.gather_to_rank0(self.outcomes)
        self.outcomes = self._processes.broadcast_from_rank0(
            lambda: {key: outcome for part in parts for key, outcome in part.items()}
        )
        return [self.outcomes[key] for key in keys]

    def _keep(self, keys: Sequence[Key], outcomes: Sequence[Outcome]) -> None:
        """Write a batch in one line, so that all of it survives or nothing."""
        super()._keep(keys, outcomes)
        assert self._journal is not None
        self._journal.append([{"requests": keys, "outcomes": [astuple(one) for one in outcomes]}])

    def _earlier(self, fingerprint: Fingerprint) -> dict[Key, Outcome]:
        found: dict[Key, Outcome] = {}
        for path in journal_paths(self._output):
            for record in read_journal(path, KIND, fingerprint).records:
                keys = (tuple(key) for key in record["requests"])
                found.update(zip(keys, (Outcome(*fields) for fields in record["outcomes"])))
        return found
