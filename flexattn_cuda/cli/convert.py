"""flexattn convert"""

from __future__ import annotations

import sys

from flexattn_cuda.tasks.options import ConvertOptions


def convert(options: ConvertOptions) -> None:
    """Write a checkpoint with safetensors in place of its pickled .bin weights."""
    from flexattn_cuda.tasks import convert as converting

    for path in converting.convert(options):
        print(f"wrote {path}", file=sys.stderr)
