"""FLEXATTN_BACKEND=races or =sanitizers: CPU tensors go to the CUDA kernels, on the executor of csrc/simt (`make simt`)."""

import os

import torch
from hypothesis import HealthCheck, settings

BACKEND = os.environ.get("FLEXATTN_BACKEND", "cpu")

# The same examples at every run, so that a red run is red again.
settings.register_profile(
    "flexattn", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("flexattn")
torch.set_num_threads(2)

if BACKEND != "cpu":
    from simt_build import load

    load(BACKEND)
    torch.use_deterministic_algorithms(True)  # outputs are NaN until they are written
