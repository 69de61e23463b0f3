"""Progress of a long task, on stderr."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Progress of this process: a bar if stderr is a terminal, otherwise a line every now and then.

    Args:
        total: Number of things to do, `done` of which were done before.
        what: Their name, in the plural.
        enabled: If False, print nothing.
    """

    def __init__(self, total: int, what: str, enabled: bool = True, done: int = 0):
        self._total, self._done, self._done_before = total, done, done
        self._what, self._enabled = what, enabled
        self._note = ""
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if enabled and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
            )
            self._bar = Bar(*columns, console=console)

    def __enter__(self) -> Progress:
        self._started = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._done, pace="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Count so many more as done."""
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, pace=self._pace(now))
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"{self._done} of {self._total} {self._what}, {self._pace(now)}")

    def note(self, text: str) -> None:
        """Show this beside the pace from now on."""
        self._note = f"{text}, "
        if self._bar is not None:
            self._bar.update(self._task, pace=self._pace(time.monotonic()))

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            print(line, file=sys.stderr, flush=True)

    def _pace(self, now: float) -> str:
        if self._done == self._done_before:
            return self._note.rstrip(", ")
        rate = (self._done - self._done_before) / (now - self._started)
        left = timedelta(seconds=round((self._total - self._done) / rate))
        return f"{self._note}{rate:.3g} per second, {left} left"
