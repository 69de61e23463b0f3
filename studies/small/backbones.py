"""The backbones that the study knows."""

from __future__ import annotations

from typing import Any

from studies.small.backbone import Backbone
from studies.small.internvl import InternVL
from studies.small.llava import Llava

BACKBONES: dict[str, Backbone] = {"llava": Llava(), "internvl": InternVL()}
"""By `ModelSizes.backbone`."""


def backbone_of(model: Any) -> Backbone:
    """Return the backbone that a model was built or loaded by."""
    return BACKBONES["internvl" if model.config.model_type == "internvl" else "llava"]
