"""flexattn predict"""

from __future__ import annotations

from flexattn_cuda.cli.runner import silence_transformers
from flexattn_cuda.tasks.options import PredictOptions


def predict(options: PredictOptions) -> None:
    """Predict hours and memory of the paper's evaluation and training on a V100 and an H100, by counting.

    No weights are loaded and no data is read.

    Examples:
        flexattn predict
        flexattn predict --shape 13b --systems llava,flexattn,flexattn-paper
    """
    silence_transformers()
    from rich.console import Console

    from flexattn_cuda.cli.console import print_all
    from flexattn_cuda.cli.predict_tables import tasks_table, training_table
    from flexattn_cuda.evaluation.prediction import predict_tasks
    from flexattn_cuda.tasks.count_flops import configs_of

    configs = configs_of(options.model, options.shape, options.systems)
    with Console(stderr=True).status("counting"):
        tables = (tasks_table(predict_tasks(configs, options.eval_batch_size)), "", training_table(configs, options))
    print_all(*tables)
