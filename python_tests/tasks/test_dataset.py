"""Training data: records as tensors and batches."""

from __future__ import annotations

import pytest
import torch
from tiny_checkpoint import processor
from training_data import write

from flexattn_cuda.errors import InputError
from flexattn_cuda.tasks import training_data as data
from flexattn_cuda.tasks.training_data import Collator, Conversations


def test_a_batch_is_padded_on_the_right_and_its_images_follow_each_other(tmp_path):
    file, images = write(tmp_path)
    one, records = processor(), data.read_records(file)
    dataset = Conversations(records, [1, 3, 5], images, one, lambda conversation: data.encode(one, conversation, 300))
    items = [dataset[number] for number in range(3)]
    batch = Collator(one.pad_id)(items)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, longest)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        for name, padding in (("input_ids", one.pad_id), ("labels", data.IGNORED)):
            assert torch.equal(batch[name][row, :length], item[name]) and (batch[name][row, length:] == padding).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
    assert "pixel_values" not in items[1] and "pixel_values" not in Collator(0)(items[1:2])
    for name in ("pixel_values", "pixel_values_hr", "valid_rect"):
        assert torch.equal(batch[name], torch.cat([items[0][name], items[2][name]]))


def test_an_image_that_disappears_is_reported_once_and_replaced(tmp_path):
    file, images = write(tmp_path)
    one, told = processor(), []
    records = data.read_records(file)
    encode = lambda conversation: data.encode(one, conversation, 300)  # noqa: E731
    dataset = Conversations(records, range(8), images, one, encode, told.append)
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"")
    for _ in range(2):
        assert torch.equal(dataset[1]["input_ids"], dataset[3]["input_ids"])
    assert [broken.record for broken in told] == [1, 2]
    for number in range(8):
        (images / f"{number}.png").unlink(missing_ok=True)
    gone = Conversations(records, [0, 1], images, one, encode)
    with pytest.raises(InputError, match="no image of the training data can be read any more"):
        gone[0]
