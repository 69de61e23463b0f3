"""Training on transformers' Trainer, which brings several processes, sharded states and mixed precision.

    flexattn train --data records.json --images DIR --model DIR --output OUT [--adapter-only]

A run writes:

    OUT/checkpoint-N/   what a run is resumed from; complete.json in it is written last
    OUT/loss.csv        step, epoch, loss, grad_norm, learning_rate
    OUT/broken.jsonl    the records that were left out, and why
    OUT/run.json        the options that a resumed run must repeat
    OUT                 at the end, the model and its processor, for `flexattn ask --model OUT`; of --adapter-only and
                        --lora the adapter alone, as in the checkpoints, for `flexattn ask --model DIR --adapter OUT`
"""

from flexattn_cuda.tasks.options import TrainOptions
from flexattn_cuda.tasks.train.checkpoints import last_complete_checkpoint
from flexattn_cuda.tasks.train.requirements import require_accelerate
from flexattn_cuda.tasks.train.run import Outcome, TrainingRun, train
from flexattn_cuda.tasks.train.trainer import AdapterTrainer, FlexAttnTrainer, answer_loss, choose_trained

__all__ = [
    "AdapterTrainer",
    "FlexAttnTrainer",
    "Outcome",
    "TrainOptions",
    "TrainingRun",
    "answer_loss",
    "choose_trained",
    "last_complete_checkpoint",
    "require_accelerate",
    "train",
]
