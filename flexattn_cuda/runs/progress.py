"""How far a long piece of work is, told on stderr."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """How far this process is: a bar where stderr is a terminal, else a line every so often.

    Args:
        total: How many things there are to do, `done` of them before.
        what: Their name, in the plural.
        wanted: Otherwise nothing is told.
    """

    def __init__(self, total: int, what: str, wanted: bool = True, done: int = 0):
        self._total, self._done, self._before = total, done, done
        self._what, self._wanted = what, wanted
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if wanted and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
            )
            self._bar = Bar(*columns, console=console)

    def __enter__(self) -> Progress:
        self._began = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._done, pace="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, pace=self._pace(now))
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"{self._done} of {self._total} {self._what}, {self._pace(now)}")

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self._wanted:
            print(line, file=sys.stderr, flush=True)

    def _pace(self, now: float) -> str:
        rate = (self._done - self._before) / (now - self._began)
        left = timedelta(seconds=round((self._total - self._done) / rate))
        return f"{rate:.3g} a second, {left} left"
