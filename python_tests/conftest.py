"""FLEXATTN_BACKEND=races or =sanitizers: CPU tensors go to the CUDA kernels, on the executor of csrc/simt (`make simt`)."""

import os

import pytest
import torch

BACKEND = os.environ.get("FLEXATTN_BACKEND", "cpu")

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # the files that need it say so, the others run
else:
    # The same examples at every run, so that a red run is red again.
    settings.register_profile(
        "flexattn", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    settings.load_profile("flexattn")

if BACKEND != "cpu":
    from simt_build import load

    load(BACKEND)
    torch.use_deterministic_algorithms(True)  # outputs are NaN until they are written


@pytest.fixture(autouse=True)
def threads(request):
    """Two for the operators, whose work is shared out; the models of the tests are so small that a second one only waits."""
    operators = request.module.__name__ in ("test_ops", "test_attention_paths")
    torch.set_num_threads(2 if operators and BACKEND == "cpu" else 1)
