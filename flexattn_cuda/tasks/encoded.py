"""Images that are asked about more than once, and encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from flexattn_cuda.families.attached import AttachedModel
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.tasks.models import HRModel, TrainingProcessor, on_device
from flexattn_cuda.tasks.training_data.dataset import joined


@dataclass(frozen=True)
class EncodedImage:
    """An image as the model takes it again and again.

    Attributes:
        width: In pixels, upright.
        height: In pixels, upright.
        inputs: What `encoded` returns.
    """

    width: int
    height: int
    inputs: dict[str, Any]


def encode_image(model: HRModel, processor: TrainingProcessor, image: Image.Image) -> EncodedImage:
    """Encode an upright RGB image."""
    return EncodedImage(*image.size, encoded(model, processor.image_inputs([image])))


@torch.no_grad()
def encoded(model: HRModel, images: dict[str, Any]) -> dict[str, Any]:
    """Return images as the model's forward takes them again and again, on its device.

    Args:
        model: The model.
        images: What `image_inputs` of its processor returns.

    Returns:
        `image_features`, `hr_features` where there is an HR view, and `valid_rect` where there is one; in families that
        take no features (Qwen-VL), the images as they came.
    """
    inputs = on_device(images, model.device)
    if isinstance(model, AttachedModel) and not model.hr_family.takes_features:
        return inputs
    assert isinstance(model, AttachedModel | FlexAttnLlavaForConditionalGeneration)
    rest = {name: inputs.pop(name) for name in ("valid_rect",) if name in inputs}
    lr, hr = model.encode(**inputs)
    return {"image_features": lr} | ({} if hr is None else {"hr_features": hr}) | rest


def prompt_inputs(
    prompts: Sequence[dict[str, list[int]]], images: Sequence[dict[str, Any]], pad_id: int, device: torch.device
) -> dict[str, Any]:
    """Return what `generate` takes of prompts of different lengths, padded on the left, and of their images.

    Args:
        prompts: What `conversation_inputs` of the processor returns of each.
        images: What `encoded` returns of their images, one after the other.
        pad_id: The token id to pad with.
        device: Of the model.
    """

    def padded(rows: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=padding, padding_side="left").to(device)

    inputs: dict[str, Any] = {
        name: padded([row[name] for row in prompts], pad_id if name == "input_ids" else 0) for name in prompts[0]
    }
    inputs["attention_mask"] = padded([[1] * len(row["input_ids"]) for row in prompts], 0)
    for name in images[0] if images else ():
        inputs[name] = joined([values[name] for values in images])
    return inputs
