"""flexattn info"""

from __future__ import annotations

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.tasks.options import InfoOptions


def info(options: InfoOptions) -> None:
    """Print versions, the build, GPUs, and why a path cannot be used; with --model, what the model is and needs.

    Examples:
        flexattn info
        flexattn info --model llava-hf/llava-1.5-7b-hf
    """
    silence_transformers()
    from flexattn_cuda.cli.console import print_all
    from flexattn_cuda.cli.info_tables import facts_table, model_report
    from flexattn_cuda.tasks.load import describe

    checkpoint = None if options.model is None else describe(options.model, options.adapter)
    print_all(facts_table(), *(() if checkpoint is None else ("", *model_report(checkpoint))))
