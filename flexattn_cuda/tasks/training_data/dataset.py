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
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.tasks.training_data.labels import IGNORED, LabelledIds
from flexattn_cuda.tasks.training_data.records import Broken, BrokenRecordError, Conversation, parse


class Conversations(Dataset):
    """Records in the form that the model takes: input_ids [N] int64, labels [N] int64 and, if it has images, what the
    image processor makes of them.

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
        processor: FlexAttnLlavaProcessor,
        encode: Callable[[Conversation], LabelledIds],
        on_broken: Callable[[Broken], None] = lambda broken: None,
    ):
        self._records, self._numbers, self._images = records, numbers, Path(images)
        self._processor, self._encode, self._on_broken = processor, encode, on_broken
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        for position in range(index, index + len(self)):
            number = self._numbers[position % len(self)]
            try:
                return self._features(parse(self._records[number]))
            except InputError as error:
                if number not in self._reported:
                    self._reported.add(number)
                    self._on_broken(Broken.of(number, BrokenRecordError("unreadable image", str(error))))
        raise InputError("no image of the training data can be read any more; check the folder of the images")

    def _features(self, conversation: Conversation) -> dict[str, torch.Tensor]:
        ids, labels = self._encode(conversation)
        features = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        if conversation.images:
            images = [open_image(self._images / image) for image in conversation.images]
            features |= self._processor.image_processor(images)
        return features


@dataclass(frozen=True)
class Collator:
    """Makes a batch of records: input_ids, labels and attention_mask [B, N], padded on the right.

    Everything else that a record has ([n, ...] for its n images: pixels, or features that were encoded before) is
    concatenated in the order of the records, some of which may have no images.

    Args:
        pad_id: The token id to pad with.
    """

    pad_id: int

    def __call__(self, records: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids, labels = ([record[name] for record in records] for name in ("input_ids", "labels"))
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        others = dict.fromkeys(name for record in records for name in record if name not in batch)
        return batch | {name: torch.cat([record[name] for record in records if name in record]) for name in others}
