"""Kills `flexattn eval` on all systems and six tasks at random moments, and compares what it leaves behind.

    HF_HUB_OFFLINE=1 PYTHONPATH=.:python_tests/support python python_tests/evaluation/whole_command.py [KILLS] [FOLDER]

It needs lmms-eval, and takes about twenty minutes on two busy cores; the tests do the same with two systems.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import evaluation_data
from eval_runs import ENCODED, TIMES, Command, answered, costs, files, lines, random_moments, write_data

from flexattn_cuda.mechanism.config import SYSTEMS

TASKS = ("vstar_bench_loss", "rsvqa_hrben", "textvqa_val", "refcoco_sizes", "pope", "gqa_map")


def main(kills: int, folder: Path) -> None:
    """Run the command undisturbed, killed, and with two processes; an AssertionError if anything differs."""
    data = write_data(folder / "data")
    evaluation_data.write_refcoco(data)
    evaluation_data.write_gqa(data / "gqa_map")
    command = Command((*SYSTEMS, "crop"), TASKS, data)

    started = time.perf_counter()
    command.run(folder / "undisturbed")
    expected = files(folder / "undisturbed")
    print(f"undisturbed: {len(expected)} files, {lines(folder / 'undisturbed')} lines of journals, {_since(started)}")
    for row in costs(folder / "undisturbed"):
        if row["task"] == "rsvqa_hrben":
            print(f"  {row['system']}: {row['documents']} questions, {row['images_encoded']} images encoded")

    started, moments = time.perf_counter(), random_moments(folder / "undisturbed", kills)
    command.run_killed(folder / "killed", moments)
    _compare(folder / "killed", folder / "undisturbed", TIMES + ENCODED)
    assert answered(folder / "killed") == answered(folder / "undisturbed")
    print(f"killed -9 at lines {moments}: all files equal, no request lost or answered twice, {_since(started)}")

    started = time.perf_counter()
    command.run(folder / "two", processes=2)
    _compare(folder / "two", folder / "undisturbed", TIMES)
    print(f"two processes: all files equal, {_since(started)}")


def _compare(output: Path, undisturbed: Path, without: tuple[str, ...]) -> None:
    found, expected = files(output), files(undisturbed)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert not [name for name in found if found[name] != expected[name]]
    assert costs(output, without) == costs(undisturbed, without)


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.0f} s"


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    main(number, Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()))
