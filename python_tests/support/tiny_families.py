"""Tiny random models of transformers' own classes, one entry per family, and prompts and images for them.

Nothing here comes from the package but its settings: what a family's prompt, views and tokens look like is written down
a second time, from transformers' side.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import nn

from flexattn_cuda import FlexAttnConfig

VOCABULARY, LAYERS, ZOOM = 100, 5, 2
IMAGE, VIDEO, VISION_START, VISION_END = range(VOCABULARY - 4, VOCABULARY)
_TEXT_TOKENS = (3, 90)  # ids of text tokens, half-open
_FACTOR = 6.0  # on the other weights, so that attention maps are not flat
_THRESHOLD = 200.0  # of 255: a threshold that the maps of these models cross in some of their cells

Pixels = torch.Tensor  # [3, height, width]


@dataclass(frozen=True)
class Prompt:
    """One row of a batch: token ids [N], and for each of them 1 in an image and 0 in text."""

    ids: torch.Tensor
    is_image: torch.Tensor


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: Of the entry.
        build: Makes the model, with transformers' own initial weights.
        unit: (height, width) in pixels of one image token.
        views: (height, width) in pixels of LR views; image number i takes the one at i modulo their number.
        encode: Makes the tokens [cells, D] of one view [3, height, width], through the family's public interface.
        text_model: Finds the language model without its head.
        tower_factor: Factor on the vision tower's weights; image tokens of different images should differ, and be about
            as large as embeddings of text.
        first_position: Position id of a prompt's first token.
        extra_tokens: Tokens after those of the base view, in the family's own format.
        prefix_types: Whether the family marks its bidirectional prefix with `token_type_ids`, all zero.
        image_types: Name of the argument that marks image tokens with ones, if there is one.
        framed: Whether a start and an end token surround an image.
        own_format: Turns inputs with base views alone, and the numbers of images, into the family's own format.
    """

    name: str
    build: Callable[[], hf.PreTrainedModel]
    unit: tuple[int, int]
    views: tuple[tuple[int, int], ...]
    encode: Callable[[hf.PreTrainedModel, Pixels], torch.Tensor]
    text_model: Callable[[hf.PreTrainedModel], hf.PreTrainedModel] = lambda model: model.model.language_model
    tower_factor: float = 6.0
    first_position: int = 0
    extra_tokens: int = 0
    prefix_types: bool = False
    image_types: str | None = None
    framed: bool = False
    own_format: Callable[[dict[str, Any], Sequence[int]], dict[str, Any]] = field(default=lambda inputs, images: inputs)

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
        """Return the model with random weights, biases and norms."""
        torch.manual_seed(seed)
        model = self.build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(self.tower_factor if ".vi" in name else _FACTOR)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.eval().to(dtype)

    def settings(self, preset: str = "released", **changes: Any) -> FlexAttnConfig:
        """Return settings that fit the model: preset "released" or "paper", with a threshold that it crosses."""
        fields: dict[str, Any] = dict(zoom=ZOOM, first_layer=2)
        fields |= dict(lowres_size=self.views[0][0], highres_size=self.views[0][0] * ZOOM)
        if preset == "paper":
            return FlexAttnConfig.paper(**(fields | dict(threshold=_THRESHOLD / 255) | changes))
        return FlexAttnConfig.released(**(fields | dict(threshold=_THRESHOLD, pool=3) | changes))

    # ------------------------------------------------------------------------------------------------------- images

    @property
    def any_size(self) -> bool:
        """Whether images may have any size: HR pixels are a list then."""
        return len(self.views) > 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the tokens of a view of so many pixels; a remainder is left out."""
        return height // self.unit[0], width // self.unit[1]

    def lr_grids(self, count: int) -> list[tuple[int, int]]:
        """Return rows and columns of the LR tokens of images 0 to count - 1."""
        return [self.grid(*self.views[number % len(self.views)]) for number in range(count)]

    def hr_images(self, count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Pixels]:
        """Return HR images [3, height, width]."""
        generator = torch.Generator().manual_seed(100 + seed)
        sizes = [self.views[number % len(self.views)] for number in range(count)]
        return [torch.randn(3, ZOOM * h, ZOOM * w, generator=generator, dtype=dtype) for h, w in sizes]

    def lr_images(self, count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Pixels]:
        """Return the LR views [3, height, width] of the same images."""
        return [
            nn.functional.interpolate(
                image[None], size=self.views[number % len(self.views)], mode="bilinear", antialias=True
            )[0]
            for number, image in enumerate(self.hr_images(count, seed, dtype))
        ]

    @torch.no_grad()
    def image_tokens(self, model: hf.PreTrainedModel, pixels: Pixels) -> torch.Tensor:
        """Return the tokens [cells, D] of one base view or one tile."""
        return self.encode(model, pixels.to(model.dtype))

    def hr_tokens(self, model: hf.PreTrainedModel, image: Pixels, zoom: int = ZOOM) -> torch.Tensor:
        """Return the tokens [zoom*rows * zoom*cols, D] of an HR image: tiles encoded one by one, then put in place."""
        rows_of_tiles = []
        for band in image.chunk(zoom, dim=1):
            tiles = [
                self.image_tokens(model, tile).unflatten(0, self.grid(*tile.shape[1:]))
                for tile in band.chunk(zoom, dim=2)
            ]
            rows_of_tiles.append(torch.cat(tiles, dim=1))
        return torch.cat(rows_of_tiles).flatten(0, 1)

    @torch.no_grad()
    def lr_tokens(self, model: hf.PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the LR tokens of all images of `inputs`, one after the other, [cells, D]."""
        if not self.any_size:
            return torch.cat([self.image_tokens(model, view) for view in inputs["pixel_values"]])
        pixels = inputs["pixel_values"].to(model.dtype)
        features = model.model.get_image_features(pixels, inputs["image_grid_thw"])
        return torch.cat(list(getattr(features, "pooler_output", features)))

    def grids_of(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Return rows and columns of the LR tokens of every image of `inputs`."""
        if self.any_size:
            return [
                (rows // 2, cols // 2) for _, rows, cols in inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()
            ]
        return [self.grid(*self.views[0])] * len(inputs.get("pixel_values", ()))

    # ------------------------------------------------------------------------------------------------------ prompts

    def inputs(
        self, images: Sequence[int] = (1,), ragged: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Return the arguments of a call with HR images.

        Args:
            images: How many images stand in each prompt; as many prompts.
            ragged: Give the prompts different numbers of text tokens.
            seed: Of tokens and pixels.
            dtype: Of the pixels.

        Returns:
            `pixel_values_hr`, `pixel_values` (only base views) and what the model's own forward takes.
        """
        count = sum(images)
        inputs = self._sequence(images, ragged, seed, extra=0)
        inputs |= self._lr_pixels(count, seed, dtype)
        hr = self.hr_images(count, seed, dtype)
        return inputs | ({"pixel_values_hr": hr if self.any_size else torch.stack(hr)} if count else {})

    def plain_inputs(
        self, images: Sequence[int] = (1,), ragged: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Return the arguments of the original model, in the family's own format: with its own tiles and newlines."""
        inputs = self._sequence(images, ragged, seed, extra=self.extra_tokens)
        inputs |= self._lr_pixels(sum(images), seed, dtype)
        return self.own_format(inputs, images) if any(images) else inputs

    def extended(self, inputs: Mapping[str, Any], answer: torch.Tensor) -> dict[str, Any]:
        """Return `inputs` with answer tokens [B, n] after the prompts, at the positions that `generate` gives them."""
        count = answer.shape[1]
        positions = inputs["position_ids"]
        last = positions.amax(0)[..., -1:] if positions.ndim == 3 else positions[:, -1:]
        later = (last + 1 + torch.arange(count)).expand(*positions.shape[:-1], count)
        text = torch.full_like(answer, int(self.prefix_types))  # after a bidirectional prefix, 1 is text
        added = {"input_ids": answer, "attention_mask": torch.ones_like(answer), "position_ids": later}
        added |= dict.fromkeys(("token_type_ids", "mm_token_type_ids"), text)
        longer = {name: torch.cat([inputs[name], more], -1) for name, more in added.items() if name in inputs}
        return dict(inputs) | longer

    def _sequence(self, images: Sequence[int], ragged: bool, seed: int, extra: int) -> dict[str, Any]:
        grids = iter(self.lr_grids(sum(images)))
        generator = torch.Generator().manual_seed(seed)
        prompts = []
        for row, count in enumerate(images):
            cells = [rows * cols + extra for rows, cols in (next(grids) for _ in range(count))]
            prompts.append(self._prompt(cells, 3 + (3 * row if ragged else 0), generator))
        length = max(len(prompt.ids) for prompt in prompts)
        ids, types = (
            torch.stack([nn.functional.pad(row, (length - len(row), 0)) for row in rows])
            for rows in zip(*((prompt.ids, prompt.is_image) for prompt in prompts))
        )
        mask = torch.stack([torch.arange(length) >= length - len(prompt.ids) for prompt in prompts]).long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.prefix_types:
            inputs["token_type_ids"] = torch.zeros_like(ids)
        if self.image_types:
            inputs[self.image_types] = types
        inputs["position_ids"] = self._positions(inputs, sum(images))
        taken = inspect.signature(type(self._skeleton).forward).parameters
        return {name: value for name, value in inputs.items() if name in taken}  # older Qwen-VL takes no token types

    def _prompt(self, cells: list[int], text: int, generator: torch.Generator) -> Prompt:
        """Return a prompt with the images between text: 4 tokens before the first, `text` after every one."""

        def words(count: int) -> torch.Tensor:
            return torch.randint(*_TEXT_TOKENS, (count,), generator=generator)

        start, end = ([torch.tensor([token])] if self.framed else [] for token in (VISION_START, VISION_END))
        parts = [words(4)]
        for count in cells:
            parts += [*start, torch.full((count,), IMAGE), *end, words(text)]
        ids = torch.cat([*parts, words(4)])
        return Prompt(ids, (ids == IMAGE).long())

    def _positions(self, inputs: dict[str, Any], count: int) -> torch.Tensor:
        """Return the position ids that `generate` would use."""
        if not self.any_size:
            return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + self.first_position
        rope_index = self._skeleton.model.get_rope_index
        known = inspect.signature(rope_index).parameters
        grids = {"image_grid_thw": self._patch_grids(count) if count else None}
        return rope_index(**{name: value for name, value in (inputs | grids).items() if name in known})[0]

    @functools.cached_property
    def _skeleton(self) -> hf.PreTrainedModel:
        with torch.device("meta"):
            return self.build()

    def _patch_grids(self, count: int) -> torch.Tensor:
        return torch.tensor([[1, 2 * rows, 2 * cols] for rows, cols in self.lr_grids(count)])

    def _lr_pixels(self, count: int, seed: int, dtype: torch.dtype) -> dict[str, Any]:
        views = self.lr_images(count, seed, dtype)
        if not count:
            return {}
        if not self.any_size:
            return {"pixel_values": torch.stack(views)}
        return {
            "pixel_values": torch.cat([patchify(view) for view in views]),
            "image_grid_thw": self._patch_grids(count),
        }


# ----------------------------------------------------------------------------------------------------- text models

_TEXT = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_LAYER_TYPES = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
_GEMMA = _TEXT | dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=16, layer_types=_LAYER_TYPES)


def _text(kind: str, **changes: Any) -> dict[str, Any]:
    return _TEXT | dict(model_type=kind) | changes


# --------------------------------------------------------------------------------------------------- vision towers

_TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)


def _clip(side: int, patch: int) -> dict[str, Any]:
    return _TOWER | dict(model_type="clip_vision_model", image_size=side, patch_size=patch, projection_dim=16)


def _siglip(side: int, patch: int) -> dict[str, Any]:
    return _TOWER | dict(model_type="siglip_vision_model", image_size=side, patch_size=patch, vision_use_head=False)


def patchify(image: Pixels, patch: int = 4, merge: int = 2, frames: int = 2) -> torch.Tensor:
    """Return the patches [rows*cols, 3*frames*patch*patch] of an image as Qwen2-VL's image processor orders them."""
    rows, cols = (size // (patch * merge) for size in image.shape[1:])
    cut = image.view(3, rows, merge, patch, cols, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    return cut[..., None, :, :].expand(*cut.shape[:-2], frames, patch, patch).reshape(rows * cols * merge**2, -1)


def _tokens(features: Any) -> torch.Tensor:
    """Return the tokens [cells, D] in what `get_image_features` returns for one image, in any version."""
    features = getattr(features, "pooler_output", features)
    return features[0] if isinstance(features, (list, tuple)) or features.ndim == 3 else features


def _encode_llava(model: hf.PreTrainedModel, pixels: Pixels) -> torch.Tensor:
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    options = {name: getattr(model.config, name) for name in names}
    return _tokens(model.model.get_image_features(pixel_values=pixels[None], **options))


def _encode_by_defaults(model: hf.PreTrainedModel, pixels: Pixels) -> torch.Tensor:
    return _tokens(model.model.get_image_features(pixels[None]))


def _encode_by_tower(model: hf.PreTrainedModel, pixels: Pixels) -> torch.Tensor:
    """Encode a view of a family whose `get_image_features` adds newline tokens."""
    states = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states
    states = states[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        states = states[:, 1:]
    return model.model.multi_modal_projector(states)[0]


def _encode_idefics(model: hf.PreTrainedModel, pixels: Pixels) -> torch.Tensor:
    return _tokens(model.model.get_image_features(pixels[None, None]))


def _encode_qwen(model: hf.PreTrainedModel, pixels: Pixels) -> torch.Tensor:
    grid = torch.tensor([[1, pixels.shape[1] // 4, pixels.shape[2] // 4]])
    return _tokens(model.model.get_image_features(patchify(pixels), grid))


# ------------------------------------------------------------------------------------- formats of the original models


def _idefics_format(inputs: dict[str, Any], images: Sequence[int]) -> dict[str, Any]:
    """Images of a prompt stand in a row, filled up with zeros."""
    views = iter(inputs["pixel_values"])
    pixels = inputs["pixel_values"].new_zeros(len(images), max(images), *inputs["pixel_values"].shape[1:])
    for row, count in enumerate(images):
        for number in range(count):
            pixels[row, number] = next(views)
    return inputs | {"pixel_values": pixels}


def _anyres_format(inputs: dict[str, Any], images: Sequence[int]) -> dict[str, Any]:
    """An image twice as wide as high: the base view, then two tiles, and a newline token after each of their rows."""
    base = inputs["pixel_values"]
    side = base.shape[-1]
    views = torch.stack([base, base.flip(-1), base.flip(-2)], 1)
    return inputs | {"pixel_values": views, "image_sizes": torch.tensor([[side, 2 * side]] * len(base))}


def _anyres_tokens(side: int) -> int:
    return side * (2 * side + 1)


# ------------------------------------------------------------------------------------------------------- the entries


def _llava() -> hf.PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=_clip(30, 6), text_config=_text("llama"), image_token_index=IMAGE, image_seq_length=25
    )
    return hf.LlavaForConditionalGeneration(config)


def _llava_siglip() -> hf.PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=_siglip(27, 6),
        text_config=_text("qwen2"),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaForConditionalGeneration(config)


def _vipllava() -> hf.PreTrainedModel:
    layers = {"vision_feature_layer": [-2, -3, 1]}
    if "vision_feature_layers" in inspect.signature(hf.VipLlavaConfig.__init__).parameters:
        layers = {"vision_feature_layers": layers["vision_feature_layer"]}
    config = hf.VipLlavaConfig(
        vision_config=_clip(24, 6), text_config=_text("llama"), image_token_index=IMAGE, image_seq_length=16, **layers
    )
    return hf.VipLlavaForConditionalGeneration(config)


def _llava_next() -> hf.PreTrainedModel:
    config = hf.LlavaNextConfig(
        vision_config=_clip(24, 6),
        text_config=_text("mistral", sliding_window=None),
        image_token_index=IMAGE,
        image_seq_length=16,
        image_grid_pinpoints=[[24, 48], [48, 24]],
    )
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> hf.PreTrainedModel:
    config = hf.LlavaOnevisionConfig(
        vision_config=_siglip(27, 6),
        text_config=_text("qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[27, 54], [54, 27]],
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _internvl(text: str) -> hf.PreTrainedModel:
    config = hf.InternVLConfig(
        vision_config=_TOWER | dict(model_type="internvl_vision", image_size=[32, 32], patch_size=[4, 4]),
        text_config=_text(text, head_dim=16) if text == "qwen3" else _text(text),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config)


def _idefics3() -> hf.PreTrainedModel:
    vision = _TOWER | dict(model_type="idefics3_vision", image_size=32, patch_size=4)
    config = hf.Idefics3Config(
        vision_config=vision, text_config=_text("llama"), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return hf.Idefics3ForConditionalGeneration(config)


def _smolvlm() -> hf.PreTrainedModel:
    vision = _TOWER | dict(model_type="smolvlm_vision", image_size=30, patch_size=3)
    config = hf.SmolVLMConfig(
        vision_config=vision, text_config=_text("llama"), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return hf.SmolVLMForConditionalGeneration(config)


_QWEN_IDS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END
)
_MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
_QWEN_TOWER = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)


def _qwen2_vl() -> hf.PreTrainedModel:
    config = hf.Qwen2VLConfig(
        text_config=_TEXT | dict(rope_parameters=_MROPE),
        vision_config=_QWEN_TOWER | dict(embed_dim=32, hidden_size=64, mlp_ratio=2),
        **_QWEN_IDS,
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> hf.PreTrainedModel:
    tower = dict(hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=16, fullatt_block_indexes=[1])
    config = hf.Qwen2_5_VLConfig(
        text_config=_TEXT | dict(rope_parameters=_MROPE), vision_config=_QWEN_TOWER | tower, **_QWEN_IDS
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _paligemma() -> hf.PreTrainedModel:
    config = hf.PaliGemmaConfig(
        vision_config=_siglip(24, 6),
        text_config=_GEMMA | dict(model_type="gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=20.0),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _gemma3() -> hf.PreTrainedModel:
    config = hf.Gemma3Config(
        vision_config=_siglip(32, 4),
        text_config=_GEMMA | dict(model_type="gemma3_text"),
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        mm_tokens_per_image=16,
    )
    model = hf.Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)  # it starts at zero
    return model


def _square(side: int, tokens: int) -> dict[str, Any]:
    """Return size and grid of a tower that turns side x side pixels into tokens x tokens."""
    return dict(unit=(side // tokens, side // tokens), views=((side, side),))


_ANY_SIZE: dict[str, Any] = dict(
    unit=(8, 8), views=((32, 48), (40, 24), (32, 32)), encode=_encode_qwen, image_types="mm_token_type_ids", framed=True
)
_IDEFICS: dict[str, Any] = dict(
    encode=_encode_idefics, text_model=lambda model: model.model.text_model, own_format=_idefics_format, framed=True
)

_ANYRES: dict[str, Any] = dict(encode=_encode_by_tower, extra_tokens=_anyres_tokens(4), own_format=_anyres_format)
_GEMMA3: dict[str, Any] = dict(encode=_encode_by_defaults, image_types="token_type_ids", framed=True)
_PALIGEMMA: dict[str, Any] = dict(encode=_encode_by_defaults, first_position=1, prefix_types=True)

FAMILIES = {
    family.name: family
    for family in (
        Family("llava", _llava, tower_factor=3.0, encode=_encode_llava, **_square(30, 5)),
        Family("llava_siglip", _llava_siglip, tower_factor=1.5, encode=_encode_llava, **_square(27, 4)),
        Family("vipllava", _vipllava, encode=_encode_by_defaults, **_square(24, 4)),
        Family("llava_next", _llava_next, tower_factor=3.0, **_square(24, 4), **_ANYRES),
        Family("llava_onevision", _llava_onevision, tower_factor=1.5, **_square(27, 4), **_ANYRES),
        Family("internvl_qwen2", lambda: _internvl("qwen2"), encode=_encode_llava, **_square(32, 4)),
        Family("internvl_qwen3", lambda: _internvl("qwen3"), encode=_encode_llava, **_square(32, 4)),
        Family("idefics3", _idefics3, **_square(32, 4), **_IDEFICS),
        Family("smolvlm", _smolvlm, **_square(30, 5), **_IDEFICS),
        Family("qwen2_vl", _qwen2_vl, **_ANY_SIZE),
        Family("qwen2_5_vl", _qwen2_5_vl, **_ANY_SIZE),
        Family("paligemma", _paligemma, **_square(24, 4), **_PALIGEMMA),
        Family("gemma3", _gemma3, **_square(32, 4), **_GEMMA3),
    )
}
