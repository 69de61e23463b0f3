"""The kernels that the tests run on: FLEXATTN_BACKEND is cpu (default), races, sanitizers or cpu-sanitizers.

With races or sanitizers, CPU tensors go to the CUDA kernels on the executor of csrc/simt (`make simt`); cpu-sanitizers
are the CPU kernels under sanitizers (`make attack-sanitizers`).
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

BACKEND = os.environ.get("FLEXATTN_BACKEND", "cpu")


def load_backend() -> None:
    """Load the chosen kernels in place of flexattn_cuda._C; one process builds them while the others wait."""
    if BACKEND == "cpu":
        return
    import torch
    from simt_build import ROOT, load

    folder = Path(ROOT, "build", "simt")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        load(BACKEND)
    torch.use_deterministic_algorithms(True)  # outputs are NaN until they are written
