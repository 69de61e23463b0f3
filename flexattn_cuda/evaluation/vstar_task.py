"""V* Bench as a task of lmms-eval."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict, Image
from lmms_eval.api.task import ConfigurableTask

from flexattn_cuda.evaluation.data import dataset_folder
from flexattn_cuda.evaluation.vstar import REPOSITORY, read_questions


class VStarBench(ConfigurableTask):
    """The task of `tasks/vstar_bench_loss.yaml`, whose files `datasets` does not read by itself."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the questions; InputError if there are none, or they cannot be used."""
        rows = [
            {"category": one.category, "image": str(one.image), "question": one.question, "options": one.options}
            for one in read_questions(dataset_folder(REPOSITORY))
        ]
        questions = Dataset.from_list(rows).cast_column("image", Image())
        self.dataset = DatasetDict(test=questions)
        self.dataset_no_image = DatasetDict(test=questions.remove_columns("image"))
