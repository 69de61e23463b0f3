"""Kills `flexattn eval` on all systems and six tasks at random moments, and compares what it leaves behind.

    HF_HUB_OFFLINE=1 PYTHONPATH=.:python_tests/support python python_tests/evaluation/whole_command.py FOLDER [PART ...]

The parts are data, undisturbed, killed, two (processes) and compare; by default all of them, one after the other, and
after data the next three can run beside each other. It needs lmms-eval. The tests do the same with two systems.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import evaluation_data
from eval_runs import ENCODED, TIMES, Command, answered, costs, files, lines, write_data

from flexattn_cuda.mechanism.config import SYSTEMS

TASKS = ("vstar_bench_loss", "rsvqa_hrben", "textvqa_val", "refcoco_sizes", "pope", "gqa_map")
KILLS, APART = 5, 60  # times, each after at most so many new lines of journals


def make_data(folder: Path) -> None:
    """Write the data of the six tasks."""
    data = write_data(folder / "data")
    evaluation_data.write_refcoco(data)
    evaluation_data.write_gqa(data / "gqa_map")


def run_undisturbed(folder: Path) -> None:
    """Run the command once."""
    command_of(folder).run(folder / "undisturbed")


def run_killed(folder: Path) -> None:
    """Kill the command five times, each time it is started again, and then let it end."""
    moments = [random.SystemRandom().randint(1, APART) for _ in range(KILLS)]
    at = command_of(folder).run_killed(folder / "killed", moments)
    print(f"killed -9 when the journals had {at} lines", flush=True)


def run_two(folder: Path) -> None:
    """Run the command with two processes."""
    command_of(folder).run(folder / "two", processes=2)


def compare(folder: Path) -> None:
    """Raise AssertionError if a killed run, or that of two processes, left other results than an undisturbed one."""
    undisturbed = folder / "undisturbed"
    expected = files(undisturbed)
    for name, without in (("killed", TIMES + ENCODED), ("two", TIMES)):
        found = files(folder / name)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        assert not [one for one in found if found[one] != expected[one]]
        assert costs(folder / name, without) == costs(undisturbed, without)
        assert answered(folder / name) == answered(undisturbed)
    requests = answered(undisturbed)
    assert len(set(requests)) == len(requests)
    print(f"{len(expected)} files and {len(requests)} requests in {lines(undisturbed)} lines: equal in all three runs")
    for row in costs(undisturbed):
        if row["task"] == "rsvqa_hrben":
            print(f"{row['system']}: {row['documents']} questions, {row['images_encoded']} images encoded")


def command_of(folder: Path) -> Command:
    """Return the command on the folder's data."""
    return Command((*SYSTEMS, "crop"), TASKS, folder / "data")


PARTS: dict[str, Callable[[Path], None]] = {
    "data": make_data,
    "undisturbed": run_undisturbed,
    "killed": run_killed,
    "two": run_two,
    "compare": compare,
}

if __name__ == "__main__":
    for part in sys.argv[2:] or PARTS:
        started = time.perf_counter()
        PARTS[part](Path(sys.argv[1]))
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
