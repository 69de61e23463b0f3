"""The library that strikes at a call that changes files (syscalls.c), and child processes that it strikes."""

from __future__ import annotations

import ctypes
import enum
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("syscalls.c")
LIBRARY = Path(__file__).parents[2] / "build" / "attack" / "syscalls.so"


class Strike(enum.IntEnum):
    """What happens at the call; see syscalls.c."""

    KILL = 0
    TEAR = 1
    FULL = 2
    LOCK = 3


def preload() -> None:
    """Start this program again with the library, unless it has it already."""
    others = os.environ.get("LD_PRELOAD", "").split()
    if str(LIBRARY) in others:
        return
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", LIBRARY, SOURCE, "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": " ".join([*others, str(LIBRARY)])}  # AddressSanitizer must be the first
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def arm(calls: int, strike: Strike) -> None:
    """Strike at this process's call of that number, counted from 1."""
    ctypes.CDLL(None).attack_arm(ctypes.c_long(calls), ctypes.c_int(strike))


def calls_seen() -> int:
    """Return the number of calls that change files since `arm`."""
    return int(ctypes.CDLL(None).attack_seen())


@dataclass(frozen=True)
class Ended:
    """A child process that has ended.

    Attributes:
        killed: Whether by SIGKILL.
        error: What it raised, as a user would see it; "" for nothing.
        is_ours: Whether the package raised it on purpose.
        told: What it has told, in order.
    """

    killed: bool
    error: str
    is_ours: bool
    told: list[Any]


class Child:
    """A forked process that runs a function, which is given another to tell something with."""

    def __init__(self, body: Callable[[Callable[[Any], None]], None]):
        self._reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reading)
            self._run(body, lambda message: _write(writing, message))
        os.close(writing)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> Ended:
        """Wait for the end."""
        with os.fdopen(self._reading, "rb") as pipe:
            lines = [json.loads(line) for line in pipe.read().splitlines(keepends=True) if line.endswith(b"\n")]
        _, status = os.waitpid(self.pid, 0)
        errors = [line for line in lines if isinstance(line, dict) and "error" in line]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if os.WIFSIGNALED(status) and not killed:
            raise RuntimeError(f"the run ended with signal {os.WTERMSIG(status)}")
        error = errors[0] if errors else {"error": "", "is_ours": True}
        return Ended(killed, error["error"], error["is_ours"], [line for line in lines if line not in errors])

    def _run(self, body: Callable[[Callable[[Any], None]], None], tell: Callable[[Any], None]) -> None:
        from python_tests.attack.verdicts import SENTENCES

        try:
            body(tell)
        except SENTENCES as error:
            tell({"error": str(error), "is_ours": True})
        except BaseException as error:
            tell({"error": repr(error), "is_ours": False})
        finally:
            os._exit(0)


def _write(descriptor: int, message: Any) -> None:
    os.write(descriptor, json.dumps(message).encode() + b"\n")
