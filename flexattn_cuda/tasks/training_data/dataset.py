"""Records as tensors, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.tasks.models import TrainingProcessor
from flexattn_cuda.tasks.training_data.labels import IGNORED, LabelledIds
from flexattn_cuda.tasks.training_data.records import Broken, BrokenRecordError, Conversation, parse


class Conversations(Dataset):
    """Records in the form that the model takes: input_ids [N] int64, labels [N] int64, the token types of families that
    have them, [N] int64, and, if it has images, what the processor makes of them.

    An image that can no longer be read is reported once, and the next usable record takes the place of its own.

    Args:
        records: As `read_records` returns them.
        numbers: Numbers of the records to use.
        images: Folder that the paths of the images are relative to.
        processor: The model's processor.
        encode: Tokenizes and labels a conversation.
        on_broken: Called with every record that turns out to be broken.
    """

    def __init__(
        self,
        records: Sequence[Any],
        numbers: Sequence[int],
        images: str | Path,
        processor: TrainingProcessor,
        encode: Callable[[Conversation], LabelledIds],
        on_broken: Callable[[Broken], None] = lambda broken: None,
    ):
        self._records, self._numbers, self._images = records, numbers, Path(images)
        self._processor, self._encode, self._on_broken = processor, encode, on_broken
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for position in range(index, index + len(self)):
            number = self._numbers[position % len(self)]
            try:
                return self._features(parse(self._records[number]))
            except InputError as error:
                if number not in self._reported:
                    self._reported.add(number)
                    self._on_broken(Broken.of(number, BrokenRecordError("unreadable image", str(error))))
        raise InputError("no image of the training data can be read any more; check the folder of the images")

    def _features(self, conversation: Conversation) -> dict[str, Any]:
        ids, labels = map(torch.tensor, self._encode(conversation))
        features: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if self._processor.token_types is not None:
            features[self._processor.token_types] = (ids == self._processor.image_token_id).long()
        if conversation.images:
            images = [open_image(self._images / image) for image in conversation.images]
            features |= self._processor.image_inputs(images)
        return features


@dataclass(frozen=True)
class Collator:
    """Makes a batch of records: input_ids, labels and attention_mask [B, N], padded on the right.

    Everything else that a record has ([n, ...] or a list of n tensors for its n images: pixels, or features that were
    encoded before) is concatenated in the order of the records, some of which may have no images.

    Args:
        pad_id: The token id to pad with.
        token_types: Name of a further feature [N], padded with 0.
    """

    pad_id: int
    token_types: str | None = None

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        paddings = {"input_ids": self.pad_id, "labels": IGNORED}
        if self.token_types is not None:
            paddings[self.token_types] = 0
        batch: dict[str, Any] = {
            name: pad_sequence([record[name] for record in records], batch_first=True, padding_value=padding)
            for name, padding in paddings.items()
        }
        ones = [torch.ones_like(record["input_ids"]) for record in records]
        batch["attention_mask"] = pad_sequence(ones, batch_first=True)
        others = dict.fromkeys(name for record in records for name in record if name not in batch)
        return batch | {name: joined([record[name] for record in records if name in record]) for name in others}


def joined(values: Sequence[Any]) -> Any:
    """Concatenate tensors, or lists of tensors."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(list(values))
    return [one for value in values for one in value]
