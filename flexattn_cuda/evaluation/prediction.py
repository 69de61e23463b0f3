"""How long `flexattn eval` takes on the paper's benchmarks, predicted by counting: nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexattn_cuda.analysis.gpus import PREDICTED
from flexattn_cuda.analysis.prediction import Prediction, Workload, predict_answers
from flexattn_cuda.evaluation.plan import IMAGES_OF_A_CHUNK
from flexattn_cuda.evaluation.published import MAP_TASK, SECONDS
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig

# Text tokens: with 80 and 55 the FLOPs of MagnifierBench and TextVQA are the published ones; the others are as long as
# the one that is asked in the same way. Steps: the length of the answers that a task asks for.
WORKLOADS = {
    "vstar_bench_loss": Workload(191, 115 * 4 + 76 * 2, 80, 0),  # options, each of which is scored
    "magnifierbench": Workload(166, 283, 80, 1),
    "rsvqa_hrben": Workload(700, 47_000, 55, 1),  # about; supplement A.1: 47k
    "textvqa_val": Workload(3166, 5000, 55, 4),
    "refcoco_sizes": Workload(3000, 25_000, 55, 26),  # about: 8811 objects, 2.8 sentences each
    "pope": Workload(500, 9000, 55, 1),
    "gqa": Workload(398, 12_578, 55, 2),
    "vqav2_val": Workload(40_504, 214_354, 55, 2),
    "mmbench_en_dev": Workload(1164, 4329, 80, 1),
    "mme": Workload(1187, 2374, 55, 1),
    "mmvet": Workload(200, 218, 55, 100),
    MAP_TASK: Workload(10_234, 132_062, 55, 2),
}
SELECTING = ("flexattn", "flexattn-paper", "random", "center")  # systems that have maps; LLaVA is asked for them


@dataclass(frozen=True)
class TaskPrediction:
    """What a task takes on a system.

    Attributes:
        task: Name of the task.
        system: The system.
        work: Its questions.
        prediction: What they take.
        published_seconds: What the paper measured on a V100; None where it did not.
    """

    task: str
    system: str
    work: Workload
    prediction: Prediction
    published_seconds: float | None


def predict_tasks(configs: dict[str, FlexAttnLlavaConfig], batch_size: int) -> list[TaskPrediction]:
    """Predict every task of the paper on every system: one after the other on one GPU, in half precision.

    Args:
        configs: Of the systems, by name.
        batch_size: Questions per batch.
    """
    return [
        TaskPrediction(
            task,
            system,
            work,
            predict_answers(config, work, batch_size, IMAGES_OF_A_CHUNK, PREDICTED),
            SECONDS.get(task, {}).get(system),
        )
        for task in WORKLOADS
        for system, config in configs.items()
        if (work := workload(task, system)) is not None
    ]


def workload(task: str, system: str) -> Workload | None:
    """Return what a task asks of a system; None if it leaves the system out."""
    work = WORKLOADS[task]
    if task != MAP_TASK or system in SELECTING:
        return work
    if system == "llava":  # each question is asked once more, for its maps and without an answer
        return replace(work, prompts=2 * work.prompts, steps=work.steps // 2)
    return None
