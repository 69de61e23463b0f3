"""What the benchmarks share: the machine's name, and medians of calls that take turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `make gpu` comes before anything is installed

from flexattn_cuda.analysis.measuring import Machine, driver_version, machine

__all__ = ["Machine", "Timing", "driver_version", "machine", "medians", "wall_clock"]


class Timing(NamedTuple):
    seconds: float  # the median
    runs: int


def wall_clock(function: Callable) -> float:
    """Return the seconds that a call takes on the CPU."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(
    functions: dict[str, Callable], seconds: float, min_runs: int = 5, time_of: Callable = wall_clock
) -> dict[str, Timing]:
    """Time functions in turn, so that a slow moment of the machine hits all of them alike.

    Args:
        functions: Each is called once before it is timed.
        seconds: How long to measure all of them together.
        min_runs: Number of runs of each, however long they take.
        time_of: Calls a function and returns the seconds that it took.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or min(map(len, times.values())) < min_runs:
        for name, function in functions.items():
            times[name].append(time_of(function))
    return {name: Timing(statistics.median(found), len(found)) for name, found in times.items()}
