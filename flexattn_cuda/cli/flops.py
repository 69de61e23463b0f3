"""flexattn flops"""

from __future__ import annotations

import sys

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.runs.options import STREAM
from flexattn_cuda.tasks.options import FlopsOptions


def flops(options: FlopsOptions) -> None:
    """Count the TFLOPs of a prompt with one image, by system and part, without loading any weights.

    Examples:
        flexattn flops
        flexattn flops --shape 13b --systems llava,hd,flexattn --json costs.json
        flexattn flops --model my-model --plot costs.png
    """
    silence_transformers()
    from rich.console import Console

    from flexattn_cuda.cli.console import print_all
    from flexattn_cuda.cli.flops_table import flops_table, implied_sentence
    from flexattn_cuda.tasks.count_flops import count_flops, plot_flops, prepare_flops, to_json, write_json

    prepared = prepare_flops(options)
    with Console(stderr=True).status("counting"):
        report = count_flops(prepared)
    if options.json_file == STREAM:
        print(to_json(report), end="")
    else:
        print_all(flops_table(report), *([] if report.implied is None else [implied_sentence(report.implied)]))
    if options.json_file not in (None, STREAM):
        write_json(report, options.json_file)
    if options.plot is not None:
        with Console(stderr=True).status("counting for the plot"):
            plot_flops(prepared, options.plot)
        print(f"wrote {options.plot}", file=sys.stderr)
