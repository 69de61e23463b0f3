"""LLaVA with FlexAttention, on transformers' own LLaVA, none of whose modelling code is repeated here.

The mechanism is attached to the language model (mechanism/attach.py): two projections on the attention modules of the
layers that attend to high-resolution (HR) tokens, an attention function, and a context for each forward call. The
systems that the paper compares with are the same class: LLaVA-HD is a longer image in the sequence, LLaVA-XAttn has
layers of its own (baselines/cross_attention.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers import AutoModelForImageTextToText, Cache, LlavaForConditionalGeneration

from flexattn_cuda import checkpoints, profiling
from flexattn_cuda.baselines.cross_attention import CrossAttachment, CrossAttentionLayer
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.arguments import IMAGE_ARGUMENTS
from flexattn_cuda.families.calls import cache_to_use, embed_text, image_positions, image_spans, may_wait, place
from flexattn_cuda.families.generation import HRGeneration
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.families.llava.family import LlavaFamily
from flexattn_cuda.families.llava.image_inputs import ImageInputs
from flexattn_cuda.families.llava.vision import encode_images, encode_tiles
from flexattn_cuda.mechanism import attention
from flexattn_cuda.mechanism.attach import Attachment
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT, check_cache_argument, one_cache
from flexattn_cuda.mechanism.call import CallShape, HRRequest, NewImages, check_keeps_all
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.counts import CountReader, read_counts
from flexattn_cuda.mechanism.trace import Trace

_IMAGE_ARGUMENTS = ("pixel_values", *IMAGE_ARGUMENTS, "valid_rect")


class FlexAttnLlavaForConditionalGeneration(HRGeneration, LlavaForConditionalGeneration):
    """LLaVA whose later layers also attend to selected tokens of the high-resolution image, or one of the systems that
    FlexAttention is compared with (`FlexAttnConfig.system`).

    Without HR pixels, or with `flexattn_config=None`, it computes what transformers' LLaVA computes.
    """

    config_class = FlexAttnLlavaConfig
    config: FlexAttnLlavaConfig
    _once: ClassVar[tuple[str, ...]] = (*_IMAGE_ARGUMENTS, "rows_per_prompt")
    _no_split_modules: ClassVar[list[str]] = [
        *(LlavaForConditionalGeneration._no_split_modules or []),
        CrossAttentionLayer.__name__,
    ]
    # The released format has HR projections in every layer, and those of another system are never used.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"self_attn\.[kv]_proj_hd\.", r"\.cross_attn\."]

    def __init__(self, config: FlexAttnLlavaConfig) -> None:
        config.check()
        super().__init__(config)
        check_cache_argument(type(self.model.language_model).forward)
        self._attachment: Attachment | None = None
        if config.system == "flexattn":
            self._attachment = Attachment(LlavaFamily(self))
        elif config.system == "xattn":
            self._attachment = CrossAttachment(LlavaFamily(self))
        self.model.language_model.set_attn_implementation(attention.NAME)
        if self._attachment is not None:
            self._attachment.install()
        self.post_init()

    # ------------------------------------------------------------------------------------------------ checkpoints

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *args: Any,
        config: FlexAttnLlavaConfig | None = None,
        flexattn: FlexAttnConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads our own format, transformers' LLaVA format, or a folder in the released format.

        Args:
            name_or_path: A local folder, or a hub id.
            config: Replaces the checkpoint's configuration.
            flexattn: Replaces the settings of the mechanism, e.g. `FlexAttnConfig.paper()`, fitted to the model.
            output_loading_info: As in transformers: (model, info) instead of model.
            kwargs: As in transformers: dtype, device_map, revision, token, cache_dir, local_files_only, force_download,
                subfolder, ...

        Raises:
            CheckpointError: The folder is missing, of an unknown format, or lacks weights.
            InputError: A device_map is given, but accelerate is missing.
        """
        _check_device_map(kwargs.get("device_map"))
        hub = checkpoints.HubOptions.pop_from(kwargs)
        folder = checkpoints.resolve_folder(name_or_path, hub, checkpoints.Part.CONFIG | checkpoints.Part.WEIGHTS)
        config = config or checkpoints.load_config(folder, hub)
        if flexattn is not None:
            config.set_settings(flexattn)
        config.check()
        model, info = checkpoints.load_weights(super().from_pretrained, folder, config, *args, hub=hub, **kwargs)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; Auto classes load what is saved, after `import flexattn_cuda` or by trust_remote_code."""
        self.config.auto_map = checkpoints.AUTO_MAP
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            checkpoints.write_hub_files(Path(save_directory))
        return saved

    # ---------------------------------------------------------------------------------------------------- forward

    def forward(  # noqa: PLR0913 (transformers' signature and ours)
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_hr: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        hr_features: torch.Tensor | None = None,
        valid_rect: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        hr_alpha: float = 1.0,
        prompt_length: int | None = None,
        flexattn_trace: Trace | None = None,
        hr_cache: bool = True,
        tiles_on_demand: bool = True,
        hr_capacity: int | None = None,
        rows_per_prompt: int = 1,
        hr_counts: CountReader = read_counts,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run one forward call; arguments and result that are not listed are those of transformers' LLaVA.

        Args:
            input_ids: [B, N]; every image is S*S adjacent ids `config.image_token_id`, with LLaVA-HD S*S + h*h.
            pixel_values: [n, 3, lowres, lowres] normalised images in the order of the prompts; made from
                `pixel_values_hr` when absent.
            pixel_values_hr: [n, 3, highres, highres] the same images; without them no row sees HR tokens.
            image_features: [n, S*S, D] from `encode`, in place of pixels: for images that are asked about more than
                once.
            hr_features: [n, h*h, D], likewise.
            valid_rect: [n, 4] int, (top, left, bottom, right) of the image inside its padding, in cells of the S x S
                grid, half-open; the whole grid when absent.
            cache: The key/value cache, which keeps the HR tokens too.
            labels: [B, N]; the rows that predict an answer token (label other than -100) see HR tokens, each with its
                own selection, mixed in with weight `hr_alpha`. Without labels: the last prompt row and later ones.
            prompt_length: Positions of the sequence up to the end of the prompt, where that is not the end of this call
                or, with a cache, of the previous one (a prompt in chunks, or drafts to verify). `generate` sets it.
            flexattn_trace: Records maps and selections.
            hr_cache: Project an HR token once per layer and keep its key and value beside the cache. If False, and
                where gradients are recorded, every call projects what it attends to. The answers agree up to rounding.
            tiles_on_demand: Encode a tile of `pixel_values_hr` when the selection first reaches it. If False, and where
                gradients are recorded, all tiles are encoded at once. The answers agree up to rounding.
            hr_capacity: FlexAttention only, for CUDA graphs and compiled decoding with a static cache, passed with the
                images: slots of each layer's pool of HR keys, shared by the batch. Pools then never grow, all tiles are
                encoded at once, and a decoding step reads nothing back; it may newly select 256 tokens of a layer for
                each row.
            rows_per_prompt: This many adjacent rows of the batch are beams of one prompt. The images come once for each
                prompt, and its rows share all that is made of them. `generate` sets it.
            hr_counts: Where the host learns how much was selected; see mechanism/counts.py.
            past_key_values: Another name of `cache`, which it has in transformers before 5.24.

        Raises:
            ValueError: If arguments do not fit together, or the cache or the attention implementation cannot be used.
            PoolOverflow: If a selection does not fit into `hr_capacity`.
        """
        images = ImageInputs(pixel_values, pixel_values_hr, image_features, hr_features, valid_rect, rows_per_prompt)
        sequence = _checked_sequence(input_ids, inputs_embeds, images, hr_capacity)
        _check_alpha(hr_alpha)
        use_cache, cache = cache_to_use(self, use_cache, one_cache(cache, past_key_values), images.have_hr)
        shape = CallShape.of(sequence, cache, prompt_length, kwargs.get("cache_position"))
        if images.have_hr:
            check_keeps_all(cache, shape.past + shape.queries)
        new = None
        if input_ids is not None:
            is_image = image_positions(input_ids, self.config.image_token_id, shape, prompt_length)
            inputs_embeds = embed_text(self, input_ids, self.config.image_token_id)
            if images.given:
                on_demand = tiles_on_demand and self._selects and may_wait(cache, hr_capacity)
                inputs_embeds, new = self._embed_images(images, is_image, inputs_embeds, on_demand)
            elif not shape.decoding and bool(is_image.any()):
                raise ValueError("the prompt has image tokens, but no pixel_values came with it")
        if self._attachment is not None:
            kwargs["flexattn_request"] = HRRequest(
                shape=shape,
                images=new,
                labels=labels,
                prompt_length=prompt_length,
                alpha=hr_alpha,
                trace=flexattn_trace,
                cached=hr_cache and cache is not None and not torch.is_grad_enabled(),
                capacity=hr_capacity,
                read_counts=hr_counts,
            )
        with profiling.phase(shape.phase):
            return super().forward(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **{CACHE_ARGUMENT: cache},
                **kwargs,
            )

    def encode(
        self, pixel_values: torch.Tensor | None, pixel_values_hr: torch.Tensor | None = None, hr: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode images into their tokens.

        No gradient flows through the HR tokens, as in the released code, except through those in the sequence of
        LLaVA-HD.

        Args:
            pixel_values: As in `forward`.
            pixel_values_hr: As in `forward`.
            hr: Encode the HR pixels too; if False they only serve to make `pixel_values` where these are absent.

        Returns:
            Low-resolution tokens [n, S*S, D] and, where HR pixels are given, HR tokens [n, h*h, D].

        Raises:
            ValueError: If pixels do not have the configured size.
        """
        settings, hr_features = self.config.flexattn, None
        size = self.config.vision_config.image_size if settings is None else settings.lowres_size
        if pixel_values_hr is not None and settings is not None:
            _check_pixels("pixel_values_hr", pixel_values_hr, settings.highres_size)
            if hr:
                with torch.set_grad_enabled(torch.is_grad_enabled() and settings.system == "hd"):
                    images = [encode_tiles(self.model, image, settings.zoom) for image in pixel_values_hr]
                hr_features = torch.stack(images)
        if pixel_values is None:
            assert pixel_values_hr is not None
            pixel_values = functional.interpolate(
                pixel_values_hr.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=True
            )
        _check_pixels("pixel_values", pixel_values, size)
        return encode_images(self.model, pixel_values), hr_features

    @property
    def flexattn_settings(self) -> FlexAttnConfig | None:
        """Settings of the mechanism; None for plain LLaVA."""
        return self.config.flexattn

    @property
    def _selects(self) -> bool:
        return self.config.system == "flexattn"

    def _shared_by_rows(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        return _IMAGE_ARGUMENTS

    def _embed_images(
        self, images: ImageInputs, is_image: torch.Tensor, inputs_embeds: torch.Tensor, on_demand: bool
    ) -> tuple[torch.Tensor, NewImages | None]:
        """Return the embeddings with the images' tokens in place, and what the mechanism must know of the images."""
        images.check_rows(len(is_image))
        tokens = self.config.image_tokens if images.have_hr else self.config.lr_grid.cells
        spans = image_spans(is_image[:: images.rows_per_prompt], [tokens] * images.count)
        if images.image_features is None:
            encoded = self.encode(images.pixel_values, images.pixel_values_hr, hr=not on_demand)
            images = images.with_features(*encoded)
        if images.have_hr and self.config.flexattn is not None:
            images.check_hr(self.config)
        rows = images.image_features
        assert rows is not None
        if images.hr_features is not None and self.config.system == "hd":
            rows = torch.cat([rows, images.hr_features.to(rows)], dim=1)
        inputs_embeds = place(inputs_embeds, is_image, rows, spans, images.rows_per_prompt)
        if not images.have_hr or self._attachment is None:
            return inputs_embeds, None
        return inputs_embeds, images.new_images(spans, self.config.image_grids)


def _checked_sequence(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, images: ImageInputs, hr_capacity: int | None
) -> torch.Tensor:
    """Return what the call's positions are, token ids or embeddings; ValueError if arguments do not fit together."""
    images.check_alternatives()
    if hr_capacity is not None and hr_capacity < 1:
        raise ValueError(f"hr_capacity is {hr_capacity}; it must be at least 1, or None for pools that grow")
    if input_ids is not None and inputs_embeds is None:
        return input_ids
    if input_ids is not None or inputs_embeds is None:
        raise ValueError("pass either input_ids or inputs_embeds")
    if images.given:
        raise ValueError("images need input_ids: the image tokens say where they stand in the prompt")
    return inputs_embeds


def _check_device_map(device_map: Any) -> None:
    """Refuse before anything is downloaded what transformers would refuse after."""
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise InputError(
            f"device_map is {device_map!r}, but accelerate, which places the weights, is missing; run pip install "
            "accelerate, or leave device_map out"
        )


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:  # NaN too
        raise ValueError(f"hr_alpha is {alpha}; it must be a weight from 0 to 1")


def _check_pixels(name: str, pixels: torch.Tensor, size: int) -> None:
    if pixels.ndim != 4 or list(pixels.shape[1:]) != [3, size, size]:
        raise ValueError(f"{name} has shape {list(pixels.shape)}; it must be [n, 3, {size}, {size}]")


AutoModelForImageTextToText.register(FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration)
checkpoints.register_key_conversion(FlexAttnLlavaForConditionalGeneration)
