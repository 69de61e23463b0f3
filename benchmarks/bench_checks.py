"""What checksums and hashes cost `ask-batch` and `train`: the processor time spent in them, as a share of a run's.

    python benchmarks/bench_checks.py [--images 64] [--steps 40] [--save-every 10] [--csv FILE]

Each row is one run of the default model on copies of its example images, one question or record each. The run and the
checks inside it are timed together, so that a busy machine changes neither; loading the model belongs to the run. The
exit code is 1 if a share exceeds 1 %.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import tables
import torch

from flexattn_cuda.runs import records, versions
from flexattn_cuda.tasks.ask_batch import answer_file
from flexattn_cuda.tasks.ask_batch import run as batch
from flexattn_cuda.tasks.examples import examples_folder, read_examples, write_examples
from flexattn_cuda.tasks.train import TrainOptions, checkpoints, train

MAX_SHARE = 0.01
CHECKS = [
    (versions, "file_hash"),  # of images
    (checkpoints, "file_hash"),  # of what training writes
    (records, "_ending"),  # of every line of a journal, and of the verdicts on images
    (batch, "content_hash"),  # of the model
]


class Spent:
    """The processor time of each call of a check, in seconds; training checks its images in threads."""

    def __init__(self) -> None:
        self.calls: list[float] = []
        for module, name in CHECKS:
            setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, check: Callable) -> Callable:
        @wraps(check)
        def counted(*arguments: Any) -> Any:
            begun = time.thread_time()
            try:
                return check(*arguments)
            finally:
                self.calls.append(time.thread_time() - begun)

        return counted


def copy_examples(folder: Path, count: int) -> None:
    """Write questions.jsonl and records.json about copies of the example images, each under a name of its own."""
    found = read_examples(examples_folder(None))
    copied = [replace(found[number % len(found)], image=folder / f"{number}.jpg") for number in range(count)]
    for number, copy in enumerate(copied):
        shutil.copyfile(found[number % len(found)].image, copy.image)
    write_examples(copied, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="number of questions, and of records")
    parser.add_argument("--steps", type=int, default=40, help="steps of training, of 4 records each")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spent, rows = Spent(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_examples(folder, options.images)
        training = TrainOptions(
            data=folder / "records.json",
            images=folder,
            output=folder / "trained",
            steps=options.steps,
            save_every=options.save_every,
            device="cpu",
        )
        runs = {
            "ask-batch": lambda: answer_file(folder / "questions.jsonl", folder / "a.jsonl", device="cpu"),
            "train": lambda: train(training),
        }
        for command, run in runs.items():
            spent.calls.clear()
            begun = time.process_time()
            run()
            rows.append({"command": command, "seconds": time.process_time() - begun, "of checks": sum(spent.calls)})
    shown = [
        [row["command"], f"{row['seconds']:.1f}", f"{row['of checks']:.3f}", f"{row['of checks'] / row['seconds']:.2%}"]
        for row in rows
    ]
    tables.print_table("processor time", ["command", "run, s", "its checks, s", "share"], shown)
    if options.csv:
        tables.write_csv(options.csv, rows)
    return int(any(row["of checks"] > MAX_SHARE * row["seconds"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
