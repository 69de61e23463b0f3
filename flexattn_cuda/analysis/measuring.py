"""Time and memory of calls on this machine, and what this machine is.

torch is imported when something is measured: `make gpu` plans its steps without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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


@dataclass(frozen=True)
class Reading:
    """One call.

    Attributes:
        seconds: From the call to its last kernel's end.
        peak_bytes: Peak of the memory in use during the call: torch's on the GPU, this process's on the CPU.
        extra_bytes: The part of it above what was in use before.
        logits: What the call returned.
    """

    seconds: float
    peak_bytes: int
    extra_bytes: int
    logits: torch.Tensor


class Meter:
    """Measures calls on the CPU or the GPU, whose queue is empty before a call and after it.

    Args:
        device: "cpu", or the current CUDA device by any name.
    """

    def __init__(self, device: str):
        import torch

        self._cuda = None if device == "cpu" else torch.cuda

    def __call__(self, function: Callable[[], torch.Tensor]) -> Reading:
        """Call a function once."""
        before = self._start_peak()
        self._synchronize()
        begin = time.perf_counter()
        logits = function()
        self._synchronize()
        seconds = time.perf_counter() - begin
        peak = _resident("VmHWM") if self._cuda is None else self._cuda.max_memory_allocated()
        return Reading(seconds, peak, peak - before, logits)

    def _synchronize(self) -> None:
        if self._cuda is not None:
            self._cuda.synchronize()

    def _start_peak(self) -> int:
        """Start a new peak; return the bytes in use."""
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
            return self._cuda.memory_allocated()
        with contextlib.suppress(OSError):  # where a container forbids it, the peak is that since the process began
            Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")


def _resident(name: str) -> int:
    """Return bytes of this process, as /proc has them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
