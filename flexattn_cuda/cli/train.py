"""flexattn train"""

from __future__ import annotations

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.runs.files import check_readable
from flexattn_cuda.tasks.options import TrainOptions


def train(options: TrainOptions) -> None:
    """Train a model on data in LLaVA's format; rerun the same command to resume after an interruption.

    On several GPUs: torchrun --nproc-per-node N -m flexattn_cuda.cli train ..., or accelerate launch, whose
    configuration may ask for FSDP or DeepSpeed.

    Examples:
        flexattn train --data records.json --images images/ --output trained --check-only
        flexattn train --data records.json --images images/ --output trained --train hr --epochs 3
        flexattn train --data records.json --images images/ --output my-adapter --model my-model --adapter-only
    """
    check_readable(options.data)
    silence_transformers()
    from flexattn_cuda.tasks import train as training

    training.train(options, progress=True)
