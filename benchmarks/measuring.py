"""What the benchmarks share: the machine's name, and medians of calls that take turns."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Machine:
    """Where a row was measured. The fields are columns of every table."""

    device: str
    driver: str
    torch: str
    cuda: str

    def columns(self) -> dict[str, str]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.columns().items())


def machine(device: str) -> Machine:
    """Return the machine's facts for tensors on `device`, "cpu" or "cuda"."""
    import torch

    if device == "cpu":
        return Machine(torch.backends.cpu.get_cpu_capability(), "", torch.__version__, "")
    return Machine(torch.cuda.get_device_name(), driver_version(), torch.__version__, str(torch.version.cuda))


def driver_version() -> str:
    """Return the version of the NVIDIA driver, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
