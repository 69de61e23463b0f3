"""transformers' own InternVL, which FlexAttention is attached to: the study's second backbone.

A token takes a square of patches (pixel shuffle), and the language model is Qwen2.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import flexattn_cuda
from flexattn_cuda.families import towers
from flexattn_cuda.inputs.hr_processor import HRProcessor, ProcessorParts
from flexattn_cuda.inputs.image_families import FAMILIES
from flexattn_cuda.inputs.images import square_resized, valid_rect_of
from flexattn_cuda.mechanism.config import FlexAttnConfig
from studies.small.backbone import Backbone, SceneImages
from studies.small.small_model import ModelSizes, build_tokenizer, draw_weights, text_fields

_FAMILY = FAMILIES["internvl"]
_TEMPLATE = (
    "{{ '<IMG_CONTEXT>' }}{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endfor %}"
)
_PADDING = tuple(round(255 * mean) for mean in OPENAI_CLIP_MEAN)


class InternVL(Backbone):
    """A small InternVL. Its own processor stretches images, so they are padded to a square before."""

    def build(self, texts: Iterable[str], flexattn: FlexAttnConfig, sizes: ModelSizes) -> tuple[Any, Any]:
        side = {"height": sizes.lowres, "width": sizes.lowres}
        images = transformers.GotOcr2ImageProcessor(size=side, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD)
        tokenizer = build_tokenizer(texts, _FAMILY.token, "<img>", "</img>")
        processor = HRProcessor(ProcessorParts(images, tokenizer, _TEMPLATE), _FAMILY, flexattn.zoom, sizes.cell)
        model = InternVLForConditionalGeneration(_config(processor, sizes))
        draw_weights(model, sizes)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model.eval(), processor

    def images(self, processor: Any, highres_size: int | None = None) -> SceneImages:
        return _PaddedImages(processor, highres_size)

    def cell(self, model: Any) -> int:
        return _FAMILY.cell(model.config)

    def encode(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        return towers.InternVL(model, FlexAttnConfig()).encode(pixels)

    def encode_tiles(self, model: Any, image: torch.Tensor, zoom: int) -> torch.Tensor:
        family = towers.InternVL(model, FlexAttnConfig(zoom=zoom))
        (grids,) = family.feature_grids(1)
        return family.encode_hr(image, grids)

    def load_as(self, folder: Path, settings: FlexAttnConfig | None) -> tuple[Any, Any]:
        model = InternVLForConditionalGeneration.from_pretrained(folder)
        # The plain model takes image_features too this way: it never sees HR tokens.
        flexattn_cuda.attach(model, settings or flexattn_cuda.settings_for(model))
        model.is_plain = settings is None
        return model.eval(), flexattn_cuda.processor_for(model, folder)

    def save(self, model: Any, processor: Any, folder: Path) -> None:
        if getattr(model, "is_plain", False):
            plain = InternVLForConditionalGeneration(model.config)
            plain.load_state_dict({n: w for n, w in model.state_dict().items() if "_proj_hd." not in n})
            plain.generation_config = model.generation_config
            model = plain
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    def asked_about(self, image: Image.Image) -> Image.Image:
        return square_resized(image, max(image.size), _PADDING)


def _config(processor: HRProcessor, sizes: ModelSizes) -> InternVLConfig:
    vision = InternVLVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=3 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=[sizes.lowres] * 2,
        patch_size=[sizes.patch] * 2,
        layer_scale_init_value=1.0,
    )
    text = Qwen2Config(**text_fields(processor.tokenizer, sizes), tie_word_embeddings=False)
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=processor.image_token_id,
        image_seq_length=sizes.lr_side**2,
        downsample_ratio=1 / sizes.shuffle,
        tie_word_embeddings=False,
    )


class _PaddedImages:
    """Images padded to a square with the mean colour, then as the model's own processor makes them."""

    def __init__(self, processor: HRProcessor, highres_size: int | None) -> None:
        own = processor.image_processor
        self.lowres_size: int = own.size["height"]
        self.image_mean, self.image_std = own.image_mean, own.image_std
        zoom = processor.zoom if highres_size is None else highres_size // self.lowres_size
        self._processor = HRProcessor(processor.wrapped, processor.family, zoom, processor.cell)

    def __call__(self, images: list[Image.Image]) -> dict[str, Any]:
        """As `SceneImages`."""
        side = self.lowres_size // self._processor.cell
        made = self._processor.image_inputs([square_resized(image, max(image.size), _PADDING) for image in images])
        rects = [valid_rect_of(image.width, image.height, side) for image in images]
        return made | {"valid_rect": torch.tensor(rects, dtype=torch.int32)}
