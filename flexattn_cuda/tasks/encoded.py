"""Images that are asked about more than once, and encoded once."""

from __future__ import annotations

from typing import Any

import torch

from flexattn_cuda.families.attached import AttachedModel
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.tasks.models import HRModel, on_device


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
