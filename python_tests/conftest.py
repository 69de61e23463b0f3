"""FLEXATTN_BACKEND=races or =sanitizers: CPU tensors go to the CUDA kernels, on the executor of csrc/simt (`make simt`)."""

import importlib.machinery
import importlib.util
import os
import sys

import torch
from hypothesis import HealthCheck, settings

BACKEND = os.environ.get("FLEXATTN_BACKEND", "cpu")

# The same examples at every run, so that a red run is red again.
settings.register_profile(
    "flexattn", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("flexattn")
torch.set_num_threads(2 if BACKEND == "cpu" else 1)

if BACKEND != "cpu":
    from simt_build import build

    name = "flexattn_cuda._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(build(BACKEND)))
    sys.modules[name] = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(sys.modules[name])
    torch.use_deterministic_algorithms(True)  # outputs are NaN until they are written
