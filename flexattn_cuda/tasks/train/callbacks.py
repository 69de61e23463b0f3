"""What the trainer writes and prints while it trains."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from flexattn_cuda.runs.files import os_errors_as_input_errors
from flexattn_cuda.runs.progress import Progress


class LossFile(TrainerCallback):
    """Writes the loss of every logged step to a CSV file.

    A resumed run starts the file again from the history in its checkpoint, which drops the steps that it repeats.
    """

    columns = ("step", "epoch", "loss", "grad_norm", "learning_rate")

    def __init__(self, path: Path):
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with os_errors_as_input_errors(self._path), open(self._path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(map(self._row, filter(_has_loss, state.log_history)))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        entry = state.log_history[-1]
        if _has_loss(entry):
            with os_errors_as_input_errors(self._path), open(self._path, "a", newline="") as file:
                csv.writer(file).writerow(self._row(entry))

    def _row(self, entry: dict[str, Any]) -> list[Any]:
        return [entry.get(column) for column in self.columns]


def _has_loss(entry: dict[str, Any]) -> bool:
    return "loss" in entry


class ProgressBar(TrainerCallback):
    """Shows progress and the loss until training ends or, if it is interrupted, until `until` is closed.

    A bar hides the cursor.
    """

    def __init__(self, enabled: bool, until: ExitStack):
        self._enabled = enabled
        self._open = until.enter_context(ExitStack())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        progress = Progress(state.max_steps, "steps", self._enabled, done=state.global_step)
        self._progress = self._open.enter_context(progress)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        entry = state.log_history[-1]
        if _has_loss(entry):
            self._progress.note(f"loss {entry['loss']:.4g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._open.close()
