"""flexattn serve"""

from __future__ import annotations

import sys

from flexattn_cuda.cli.runner import require, silence_transformers
from flexattn_cuda.tasks.options import ServeOptions


def serve(options: ServeOptions) -> None:
    """Serve a web page and an API that OpenAI's clients speak; Ctrl-C stops.

    Examples:
        flexattn serve
        flexattn serve --model my-model --port 8080 --batch-size 16
        FLEXATTN_TOKEN=secret flexattn serve --host 0.0.0.0 --files images/
    """
    require("serve", "fastapi", "uvicorn", "prometheus_client")
    silence_transformers()
    from flexattn_cuda.serve import run

    run.serve(options, lambda address: print(f"serving {address}  (Ctrl-C stops)", file=sys.stderr, flush=True))
