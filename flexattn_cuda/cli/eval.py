"""flexattn eval"""

from __future__ import annotations

import os
import sys

from flexattn_cuda.cli.runner import require, silence_transformers
from flexattn_cuda.tasks.options import EvalOptions


def eval(options: EvalOptions) -> None:  # noqa: A001 - the name of the command
    """Evaluate systems on benchmarks by lmms-eval; rerun the same command to resume after an interruption.

    Writes the paper's tables beside its own figures as CSV and as a page, report.html.

    On several GPUs: torchrun --nproc-per-node N -m flexattn_cuda.cli eval ..., or accelerate launch.

    Examples:
        flexattn eval --systems own --tasks pope,mme --data data --output results
        flexattn eval --model senfu/llava-v1.5-7b-flexattn --dtype float16 --output results
        torchrun --nproc-per-node 4 -m flexattn_cuda.cli eval --tasks vstar_bench_loss --output results
    """
    require("eval", "lmms_eval")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of lmms-eval and datasets, beside which ours would be lost
    silence_transformers()
    from flexattn_cuda.evaluation.run import evaluate

    evaluate(options, progress=True)
    print(f"wrote {options.output / 'report.html'}", file=sys.stderr)
