"""LLaVA as this package has it: the study's first backbone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from flexattn_cuda import checkpoints
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.families.llava.vision import encode_images, encode_tiles
from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor, FlexAttnLlavaProcessor
from flexattn_cuda.mechanism.config import FlexAttnConfig
from studies.small.backbone import Backbone, SceneImages
from studies.small.small_model import ModelSizes, build_model, build_processor


class Llava(Backbone):
    """A CLIP tower, a projector and Llama, with the released preprocessing."""

    def build(self, texts: Iterable[str], flexattn: FlexAttnConfig, sizes: ModelSizes) -> tuple[Any, Any]:
        processor = build_processor(texts, flexattn, sizes)
        return build_model(processor, None, sizes), processor

    def images(self, processor: Any, highres_size: int | None = None) -> SceneImages:
        own: FlexAttnLlavaImageProcessor = processor.image_processor
        if highres_size in (None, own.highres_size):
            return own
        return FlexAttnLlavaImageProcessor(highres_size=highres_size, lowres_size=own.lowres_size, lr_side=own.lr_side)

    def cell(self, model: Any) -> int:
        return int(model.config.vision_config.patch_size)

    def encode(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        return encode_images(model.model, pixels)

    def encode_tiles(self, model: Any, image: torch.Tensor, zoom: int) -> torch.Tensor:
        return encode_tiles(model.model, image, zoom)

    def load_as(self, folder: Path, settings: FlexAttnConfig | None) -> tuple[Any, Any]:
        config = checkpoints.load_config(folder).with_settings(settings)
        model = FlexAttnLlavaForConditionalGeneration.from_pretrained(folder, config=config)
        return model.eval(), FlexAttnLlavaProcessor.from_pretrained(folder, config=config)

    def save(self, model: Any, processor: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
