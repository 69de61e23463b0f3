"""Runs attacks: cases from a seed, each in a child process that may crash or hang, verdicts in a file to resume from.

A worker is forked for every kind of attack; it judges one case after the other and sends the verdicts through a pipe.
Where a worker dies or says nothing for too long, the case that it was at has crashed or hung, and another is forked.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from python_tests.attack.verdicts import BAD, Verdict, judge

SECONDS_TO_START = 120.0


class Attack(Protocol):
    """What a kind of attack needs, made once in each worker with a folder of its own."""

    def run(self, number: int, rng: random.Random) -> Counter[Verdict] | Verdict:
        """Run a case.

        Returns:
            Its verdict, or the verdicts of several calls.

        Raises:
            WrongError, LostError: If something is not right.
            Exception: As a user would see it; an error that the package raises on purpose is a refusal.
        """
        ...


@dataclass(frozen=True)
class Kind:
    """A kind of attack.

    Attributes:
        name: In the table.
        start: Makes an attack in a new, empty folder.
        cases: Number of cases of a whole run.
        seconds: Maximum time of a case; it has hung if it takes longer.
        short: Number of cases of `make test`.
    """

    name: str
    start: Callable[[Path], Attack]
    cases: int
    seconds: float = 60.0
    short: int = 8


@dataclass
class Finding:
    """A line of the file of verdicts."""

    kind: str
    case: int
    seed: int
    verdicts: dict[str, int]
    said: str = ""

    def bad(self) -> bool:
        return any(self.verdicts.get(verdict.value) for verdict in BAD)


@dataclass
class Findings:
    """The findings of a run, kept in a file so that it can be resumed."""

    path: Path | None
    seed: int
    all: dict[tuple[str, int], Finding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            with suppress(ValueError, TypeError):  # a line whose writing was cut off
                finding = Finding(**json.loads(line))
                if finding.seed == self.seed:
                    self.all[finding.kind, finding.case] = finding

    def add(self, finding: Finding) -> None:
        self.all[finding.kind, finding.case] = finding
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(vars(finding)) + "\n")

    def table(self) -> str:
        """Return a row for each kind: its calls, and the number of each verdict."""
        rows = [["kind", "cases", *(verdict.value for verdict in (Verdict.REFUSED, Verdict.RIGHT, *BAD))]]
        for kind in dict.fromkeys(kind for kind, _ in self.all):
            total: Counter[str] = Counter()
            for finding in self.all.values():
                total.update(finding.verdicts if finding.kind == kind else {})
            rows.append([kind, str(total.total()), *(str(total[name]) for name in rows[0][2:])])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]])

    def bad(self) -> list[Finding]:
        return [finding for finding in self.all.values() if finding.bad()]


def run(
    kinds: Sequence[Kind], findings: Findings, cases: Callable[[Kind], int], jobs: int, until: float, progress: bool
) -> None:
    """Run the cases of some kinds that have no finding yet, `jobs` at a time, until a time of `time.monotonic`."""
    for kind in kinds:
        left = [number for number in range(cases(kind)) if (kind.name, number) not in findings.all]
        begun = time.monotonic()
        for finding in _judged(kind, findings.seed, left, jobs, until):
            findings.add(finding)
            if finding.bad():
                print(f"{kind.name} {finding.case}: {finding.verdicts}\n{finding.said}", file=sys.stderr, flush=True)
        if progress and left:
            print(f"{kind.name}: {len(left)} cases, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def _judged(kind: Kind, seed: int, numbers: list[int], jobs: int, until: float) -> Iterator[Finding]:
    """Yield the findings of several workers as they come."""
    shares = [share for number in range(jobs) if (share := numbers[number::jobs])]
    workers = [_Worker(kind, seed, share) for share in shares]
    try:
        while workers and time.monotonic() < until:
            ready, _, _ = select.select(workers, [], [], 1.0)
            for worker in workers:
                yield from worker.heard() if worker in ready else worker.silent()
            workers = [worker for worker in workers if not worker.done]
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that judges cases, followed from outside, and started again after one that crashed or hung."""

    def __init__(self, kind: Kind, seed: int, numbers: list[int]):
        self._kind, self._seed, self._left = kind, seed, numbers
        self._start()

    @property
    def done(self) -> bool:
        return not self._left

    def fileno(self) -> int:
        return self._reading

    def heard(self) -> Iterator[Finding]:
        """Yield what the process has said or, if it has ended, that the case that it was at has crashed."""
        part = os.read(self._reading, 1 << 16)
        if not part:
            status = self._process.stop()
            yield self._ended(Verdict.CRASH, f"the process ended with status {status}")
            return
        *lines, self._buffer = (self._buffer + part).split(b"\n")
        for message in map(json.loads, lines):
            self._allow(self._kind.seconds)
            if message["case"] == "start" and message["said"]:
                raise RuntimeError(f"{self._kind.name} cannot start: {message['said']}")
            if message["case"] != "start":
                self._left.remove(message["case"])
                yield Finding(self._kind.name, message["case"], self._seed, message["verdicts"], message["said"])
        if self.done:
            self.stop()

    def silent(self) -> Iterator[Finding]:
        """Yield that a case hangs, if it has taken too long; time in which it waited for a processor is not its own."""
        if time.monotonic() - self._process.seconds_without_processor() > self._deadline:
            self._process.stop()
            yield self._ended(Verdict.HANG, f"no end after {self._kind.seconds:.0f} s")

    def stop(self) -> None:
        self._process.stop()
        os.close(self._reading)

    def _allow(self, seconds: float) -> None:
        self._deadline = time.monotonic() - self._process.seconds_without_processor() + seconds

    def _ended(self, verdict: Verdict, said: str) -> Finding:
        """End the case that the process was at, and judge the others in another one."""
        case = self._left.pop(0)
        os.close(self._reading)
        if not self.done:
            self._start()
        return Finding(self._kind.name, case, self._seed, {verdict.value: 1}, said)

    def _start(self) -> None:
        self._reading, writing = os.pipe()
        self._buffer = b""
        self._process = _Fork(lambda: self._judge_all(writing))
        self._allow(SECONDS_TO_START)
        os.close(writing)

    def _judge_all(self, writing: int) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="attack-") as folder:
                attack = self._kind.start(Path(folder))
                _send(writing, {"case": "start", "said": ""})
                for number in self._left:
                    rng = random.Random(f"{self._seed} {self._kind.name} {number}")
                    verdicts, said = judge(partial(attack.run, number, rng))
                    counts = {verdict.value: count for verdict, count in verdicts.items()}
                    _send(writing, {"case": number, "verdicts": counts, "said": said})
        except BaseException as error:
            _send(writing, {"case": "start", "said": repr(error)})


class _Fork:
    """A child process with a group of its own, which ends with it."""

    def __init__(self, body: Callable[[], None]):
        self._waited: dict[int, float] = {}  # by process, also of those that have ended
        self._pid = os.fork()
        if self._pid == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.setpgid(0, 0)
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                body()
            finally:
                os._exit(0)

    def seconds_without_processor(self) -> float:
        """Return for how long it and its children could have run, but others did, as Linux counts it; 0 elsewhere."""
        for pid in _with_children(self._pid):
            with suppress(OSError, IndexError, ValueError):
                self._waited[pid] = int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
        return sum(self._waited.values())

    def stop(self) -> int:
        """End the group, and return the status of the process."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            return os.waitpid(self._pid, 0)[1]
        return 0


def _with_children(pid: int) -> Iterator[int]:
    yield pid
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _with_children(int(child))


def _send(descriptor: int, message: dict[str, Any]) -> None:
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]
