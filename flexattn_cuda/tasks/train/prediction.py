"""What a recipe takes on GPUs that are not here, predicted by counting: nothing here was measured."""

from __future__ import annotations

import math
import sys

from flexattn_cuda.analysis.gpus import GIB, PREDICTED, Gpu
from flexattn_cuda.analysis.prediction import MAX_GPUS, TrainingPrediction, TrainingRun, predict_training
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.tasks.options import RECIPES, TrainOptions


def print_prediction(options: TrainOptions, config: FlexAttnLlavaConfig, records: int, processes: int) -> None:
    """Say on stderr what a run of a recipe does, and what it would take on other machines."""
    assert options.recipe is not None
    recipe = RECIPES[options.recipe]
    steps, batches = math.ceil(records / recipe.records_per_step), options.accumulated_batches(processes)
    print(
        f"recipe {options.recipe} ({recipe.source}): epochs {recipe.epochs:g}, records {records}, steps {steps}; a "
        f"step of {recipe.records_per_step} records is processes {processes} x batches {batches} x records "
        f"{options.batch_size}",
        file=sys.stderr,
    )
    run = TrainingRun(records, recipe.text_tokens, options.batch_size, options.gradient_checkpointing)
    for gpu in PREDICTED:
        print(f"predicted, not measured: {_sentence(predict_training(config, run, gpu), gpu)}", file=sys.stderr)


def _sentence(found: TrainingPrediction, gpu: Gpu) -> str:
    hours = f"{found.gpu_hours:.3g} GPU-hours of {gpu.name}"
    if found.gpus is None or found.memory is None:
        return f"{hours}; even {MAX_GPUS} have too little memory for such a batch"
    sharded = ", with FSDP" if found.gpus > 1 else ""
    return (
        f"{hours}; on {found.gpus}, the fewest{sharded}, {found.hours:.3g} hours and {found.memory / GIB:.3g} GiB each"
    )
