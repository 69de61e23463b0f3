"""`flexattn eval` as a user starts it, with the model that ships with the package, and what it leaves behind."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import evaluation_data

from flexattn_cuda.runs.records import from_line

# In the words of that model. The first question of each category is about the same image.
VSTAR = {
    "direct_attributes": [
        ("What does the sign say that is red?", ["89", "1 7", "4"]),
        ("Which digits are on the sign that is blue?", ["23", "5"]),
    ],
    "relative_position": [("What does the sign say that is black?", ["7", "70", "8 8"])],
}
TIMES = ("seconds", "seconds_per_document")
ENCODED = ("images_encoded", "tiles_encoded")  # a run that is resumed encodes the images of its last chunk again


def write_data(folder: Path) -> Path:
    """Write V* Bench, RSVQA (ten questions about each of three images), POPE, MME and TextVQA."""
    evaluation_data.write_vstar(folder / "vstar_bench", VSTAR)
    evaluation_data.write_rsvqa(folder / "rsvqa_hrben", kinds=("presence", "comp") * 15, per_image=10)
    evaluation_data.write_benchmarks(folder, lambda row: "42")
    return folder


@dataclass(frozen=True)
class Command:
    """`flexattn eval` of some systems on some tasks."""

    systems: Sequence[str]
    tasks: Sequence[str]
    data: Path

    def start(self, output: Path, processes: int = 1) -> subprocess.Popen[str]:
        """Start the command, by torchrun if there are several processes."""
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        named = ["--systems", ",".join(self.systems), "--tasks", ",".join(self.tasks)]
        options = ["--data", self.data, "--output", output, "--batch-size", 2, "--pictures", 1, "--device", "cpu"]
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "flexattn_cuda.cli", "eval", *named, *map(str, options)],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(output.parent / "hub"), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, output: Path, processes: int = 1) -> str:
        """Run the command to its end, and return what it said."""
        process = self.start(output, processes)
        _, said = process.communicate()
        assert process.returncode == 0, said
        return said

    def run_killed(self, output: Path, moments: Sequence[int]) -> list[int]:
        """Kill the command each time that its journals have so many new lines, start it again, and then let it end.

        Returns:
            The number of lines at each kill.
        """
        killed = []
        for moment in moments:
            before, process = lines(output), self.start(output)
            while process.poll() is None and lines(output) < before + moment:
                time.sleep(0.01)
            assert process.poll() is None, f"it ended before it could be killed: {process.communicate()[1]}"
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed.append(lines(output))
        self.run(output)
        return killed


def lines(output: Path) -> int:
    """Return the number of lines of the journals."""
    return sum(path.read_bytes().count(b"\n") for path in output.glob("journals/*/*"))


def costs(output: Path, without: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """Return the rows of costs.csv without some columns."""
    rows = csv.DictReader((output / "costs.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


def files(output: Path) -> dict[str, bytes]:
    """Return all results but those that hold times."""
    found = [
        *output.glob("results.csv"),
        *output.glob("table_*.csv"),
        *output.glob("samples/*/*"),
        *output.glob("pictures/*"),
    ]
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


def answered(output: Path) -> list[tuple]:
    """Return what the journals name, in which a request that was answered twice stands twice."""
    found = [(path, line) for path in output.glob("journals/*/*") for line in path.read_bytes().splitlines(True)]
    headers = dict(reversed(found))
    records = [(path, from_line(line, zlib.crc32(headers[path]))) for path, line in found if line != headers[path]]
    return sorted((path.parent.name, *key) for path, record in records if record for key in record["requests"])
