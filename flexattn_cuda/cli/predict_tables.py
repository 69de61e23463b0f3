"""What `flexattn predict` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from flexattn_cuda.analysis.gpus import GIB, PREDICTED, Gpu
from flexattn_cuda.analysis.prediction import Prediction, TrainingRun, predict_training
from flexattn_cuda.evaluation.prediction import TaskPrediction
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.tasks.options import RECIPES, PredictOptions

_TASKS = "Predicted, not measured: evaluation on one GPU"


def tasks_table(found: Sequence[TaskPrediction]) -> Table:
    """Return a line for each task and system, and the sums of the systems."""
    table = Table(box=None, pad_edge=False, title=_TASKS, title_justify="left")
    table.add_column("task")
    table.add_column("system")
    for name in ("prompts", "images", "TFLOPs per prompt", "per image", "GiB"):
        table.add_column(name, justify="right")
    for gpu in PREDICTED:
        table.add_column(f"hours, {gpu.name}", justify="right")
    table.add_column("the paper's, V100", justify="right")
    task = None
    for one in found:
        what, work = one.prediction, one.work
        table.add_row(
            "" if one.task == task else one.task,
            one.system,
            str(work.prompts),
            str(work.images),
            f"{what.prompt_flops / 1e12:.3g}",
            f"{what.image_flops / 1e12:.3g}",
            f"{what.memory / GIB:.1f}",
            *(_hours_on(gpu, [what]) for gpu in PREDICTED),
            "" if one.published_seconds is None else _hours(one.published_seconds),
        )
        task = one.task
    for number, system in enumerate(dict.fromkeys(one.system for one in found)):
        own = [one.prediction for one in found if one.system == system]
        sums = [_hours_on(gpu, own) for gpu in PREDICTED]
        most = f"{max(one.memory for one in own) / GIB:.1f}"
        table.add_row("" if number else "all tasks", system, *[""] * 4, most, *sums, style="bold")
    return table


def _hours_on(gpu: Gpu, found: Sequence[Prediction]) -> str:
    """Return the hours of all of them, unless one does not fit into the GPU's memory."""
    if not all(gpu.has_room(one.memory) for one in found):
        return "no room"
    return _hours(sum(one.seconds[gpu.name] for one in found))


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g}"


def training_table(configs: dict[str, FlexAttnLlavaConfig], options: PredictOptions) -> Table:
    """Return a line for each system, with the paper's recipe."""
    recipe = RECIPES["paper"]
    run = TrainingRun(options.records or recipe.records, recipe.text_tokens, options.train_batch_size)
    table = Table(
        box=None,
        pad_edge=False,
        title=f"Predicted, not measured: training by the paper's recipe on {run.records} records",
        title_justify="left",
    )
    table.add_column("system")
    table.add_column("TFLOPs per record", justify="right")
    for gpu in PREDICTED:
        for name in (f"{gpu.name}: GPU-hours", "GPUs", "hours", "GiB each"):
            table.add_column(name, justify="right")
    for system, config in configs.items():
        cells = []
        for gpu in PREDICTED:
            one = predict_training(config, run, gpu)
            fits = ("none",) * 3 if one.gpus is None else (str(one.gpus), f"{one.hours:.3g}", f"{one.memory / GIB:.1f}")
            cells += [f"{one.gpu_hours:.0f}", *fits]
        table.add_row(system, f"{one.flops / 1e12:.3g}", *cells)
    return table
