"""What every test gets: the kernels under test, threads, examples that repeat, and shared fixtures."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from backend import BACKEND, load_backend

if TYPE_CHECKING:
    from playwright.sync_api import Browser

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # files that need it say so, the others run
else:
    # The same examples at every run, so that a red run is red again.
    settings.register_profile(
        "flexattn", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    settings.load_profile("flexattn")

load_backend()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    """Use two threads for the operators, which share out their work; the tests' models are too small for a second."""
    operators = request.path.parent.name == "ops"
    torch.set_num_threads(2 if operators and BACKEND == "cpu" else 1)


@pytest.fixture
def codes_in_order(monkeypatch) -> None:
    """Keep bitsandbytes from giving 4-bit codes another order, which it does on CPUs with bfloat16 instructions.

    It does so at the first call, for sizes that tiny models do not have, and computes in bfloat16 from then on.
    """
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; tests that use it are marked `browser`."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("there is no Chromium; install it (Debian: apt-get install chromium), or pass -m 'not browser'")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


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
