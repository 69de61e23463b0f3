"""flexattn convert"""

from __future__ import annotations

import sys

from flexattn_cuda.tasks.options import ConvertOptions


def convert(options: ConvertOptions) -> None:
    """Write a checkpoint with safetensors in place of its pickled .bin weights.

    Examples:
        flexattn convert my-model -o my-model-safe
        flexattn convert senfu/llava-v1.5-7b-flexattn -o llava-v1.5-7b-flexattn
    """
    from flexattn_cuda.tasks import convert as converting

    for path in converting.convert(options):
        print(f"wrote {path}", file=sys.stderr)
