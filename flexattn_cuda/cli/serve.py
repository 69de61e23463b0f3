"""flexattn serve"""

from __future__ import annotations

import importlib.util
import sys

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.errors import InputError
from flexattn_cuda.tasks.options import ServeOptions


def serve(options: ServeOptions) -> None:
    """Serve a web page and an API that OpenAI's clients speak; Ctrl-C stops."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} is not installed; run: pip install 'flexattn_cuda[serve]'")
    silence_transformers()
    from flexattn_cuda.serve import run

    run.serve(options, lambda address: print(f"serving {address}  (Ctrl-C stops)", file=sys.stderr, flush=True))
