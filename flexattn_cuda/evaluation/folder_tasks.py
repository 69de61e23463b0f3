"""Tasks of lmms-eval whose files `datasets` does not read by itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from datasets import Dataset, DatasetDict, Image
from lmms_eval.api.task import ConfigurableTask

from flexattn_cuda.evaluation import gqa, rsvqa, vstar
from flexattn_cuda.evaluation.data import dataset_folder, unpacked_folder


class FolderTask(ConfigurableTask):
    """A task that makes its rows of a folder."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Return the questions, of which "image" is a path."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the questions; InputError if there are none, or they cannot be used."""
        questions = Dataset.from_list(self.rows()).cast_column("image", Image())
        self.dataset = DatasetDict(test=questions)
        self.dataset_no_image = DatasetDict(test=questions.remove_columns("image"))


class VStarBench(FolderTask):
    """The task of `tasks/vstar_bench_loss.yaml`."""

    def rows(self) -> list[dict[str, Any]]:
        """As in `FolderTask`."""
        return [
            {"category": one.category, "image": str(one.image), "question": one.question, "options": one.options}
            for one in vstar.read_questions(dataset_folder(vstar.REPOSITORY))
        ]


class RSVQA(FolderTask):
    """The task of `tasks/rsvqa_hrben.yaml`."""

    def rows(self) -> list[dict[str, Any]]:
        """As in `FolderTask`."""
        return rsvqa.read_rows(unpacked_folder(rsvqa.FOLDER, rsvqa.SOURCE))


class GQAMap(FolderTask):
    """The task of `tasks/gqa_map.yaml`, which has one metric for each layer of the model."""

    def rows(self) -> list[dict[str, Any]]:
        """As in `FolderTask`."""
        return gqa.read_rows(unpacked_folder(gqa.FOLDER, gqa.SOURCE))

    def aggregation(self) -> dict[str, Any]:
        """Return the mean for any metric."""
        return _MeanOfAny()

    def higher_is_better(self) -> dict[str, bool]:
        """Return nothing: the layers are known when the model has answered."""
        return {}


class _MeanOfAny(dict[str, Any]):
    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Any:
        return lambda values: sum(values) / len(values)
