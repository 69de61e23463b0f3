"""FLEXATTN_BACKEND=races or =sanitizers: CPU tensors go to the CUDA kernels, on the executor of csrc/simt (`make simt`)."""

import os
import sys

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
        "flexattn",
        deadline=None,
        derandomize=True,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
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


@pytest.fixture
def flexattn(monkeypatch, capsys):
    """flexattn(*arguments) -> (exit code, stdout, stderr)."""
    from flexattn_cuda import cli

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flexattn", *map(str, arguments)])
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "reconfigure", lambda **_: None, raising=False)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run
