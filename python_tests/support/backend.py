"""The kernels that the tests run on: FLEXATTN_BACKEND is cpu (default), races or sanitizers.

With races or sanitizers, CPU tensors go to the CUDA kernels on the executor of csrc/simt (`make simt`).
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

BACKEND = os.environ.get("FLEXATTN_BACKEND", "cpu")


def load_executor() -> None:
    """Load the executor in place of flexattn_cuda._C; one process builds it while the others wait."""
    import torch
    from simt_build import ROOT, load

    folder = Path(ROOT, "build", "simt")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        load(BACKEND)
    torch.use_deterministic_algorithms(True)  # outputs are NaN until they are written
