"""flexattn tune"""

from __future__ import annotations

import sys

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import make_writable_folder
from flexattn_cuda.tasks.options import TuneOptions


def tune(options: TuneOptions) -> None:
    """Fit FlexAttention to a model by a FILE of questions: find the layer that looks at the right place.

    Examples:
        flexattn tune questions.jsonl --model OpenGVLab/InternVL3-1B-hf --out my-adapter
        flexattn tune questions.jsonl --model OpenGVLab/InternVL3-1B-hf --out my-adapter --share 0.2
    """
    silence_transformers()
    from flexattn_cuda.cli.console import print_all
    from flexattn_cuda.cli.tune_table import scores_table
    from flexattn_cuda.families.attach import save_adapter
    from flexattn_cuda.families.attached import AttachedModel
    from flexattn_cuda.tasks import load as loading
    from flexattn_cuda.tasks import tune as tuning

    examples = tuning.read_examples(options.questions)
    make_writable_folder(options.out)
    model, processor = loading.load(
        options.model, options.device, options.dtype, adapter=options.adapter, quantize=options.quantize
    )
    if not isinstance(model, AttachedModel):
        raise InputError(
            f"{options.model} is loaded as this package's own LLaVA, whose settings are those that it was trained "
            "with; pass a model of another family, or one with --adapter"
        )
    found = tuning.tune(model, processor, examples, options.share)
    save_adapter(model, options.out)
    print_all(*scores_table(found))
    print(f"wrote {options.out}", file=sys.stderr)
