"""LLaVA with FlexAttention, on transformers' own LLaVA, none of whose modelling code is repeated here.

The mechanism is attached to the language model (mechanism/attach.py): two projections on the attention modules of the
layers that attend to high-resolution (HR) tokens, an attention function, and a context for each forward call. The
systems that the paper compares with are the same class: LLaVA-HD is a longer image in the sequence, LLaVA-XAttn has
layers of its own (baselines/cross_attention.py).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers import AutoModelForImageTextToText, Cache, DynamicCache, LlavaForConditionalGeneration

from flexattn_cuda import checkpoints, profiling
from flexattn_cuda.baselines.cross_attention import CrossAttachment, CrossAttentionLayer
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.families.llava.family import LlavaFamily, image_spans
from flexattn_cuda.families.llava.image_inputs import ImageInputs
from flexattn_cuda.families.llava.vision import encode_images, encode_tiles
from flexattn_cuda.mechanism import attention
from flexattn_cuda.mechanism.attach import Attachment
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT, check_cache_argument, one_cache, rename_cache
from flexattn_cuda.mechanism.call import CallShape, HRRequest, NewImages, Span
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.counts import CountReader, read_counts
from flexattn_cuda.mechanism.trace import Trace

_IMAGE_ARGUMENTS = ("pixel_values", "pixel_values_hr", "image_features", "hr_features", "valid_rect")
_ONCE = (*_IMAGE_ARGUMENTS, "rows_per_prompt")  # come with the prompt, and then live in the cache and beside it
_OWN_ARGUMENTS = (*_ONCE, "prompt_length", "flexattn_trace", "hr_alpha", "hr_cache", "hr_capacity", "tiles_on_demand")


class FlexAttnLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA whose later layers also attend to selected tokens of the high-resolution image, or one of the systems that
    FlexAttention is compared with (`FlexAttnConfig.system`).

    Without HR pixels, or with `flexattn_config=None`, it computes what transformers' LLaVA computes.
    """

    config_class = FlexAttnLlavaConfig
    config: FlexAttnLlavaConfig
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
            flexattn: Replaces the settings of the mechanism, e.g. `FlexAttnConfig.paper()`.
            output_loading_info: As in transformers: (model, info) instead of model.
            kwargs: As in transformers: dtype, device_map, revision, token, cache_dir, local_files_only, force_download,
                subfolder, ...

        Raises:
            CheckpointError: The folder is missing, of an unknown format, or lacks weights.
        """
        hub = checkpoints.HubOptions.pop_from(kwargs)
        folder = checkpoints.resolve_folder(name_or_path, hub, checkpoints.Part.CONFIG | checkpoints.Part.WEIGHTS)
        config = config or checkpoints.load_config(folder, hub)
        if flexattn is not None:
            config.flexattn_config = flexattn.to_dict()
        config.check()
        model, info = checkpoints.load_weights(super().from_pretrained, folder, config, *args, hub=hub, **kwargs)
        return (model, info) if output_loading_info else model

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
        use_cache, cache = self._cache_to_use(use_cache, one_cache(cache, past_key_values))
        shape = CallShape.of(sequence, cache, prompt_length, kwargs.get("cache_position"))
        new = None
        if input_ids is not None:
            is_image = self._image_positions(input_ids, shape, prompt_length)
            inputs_embeds = self._embed_text(input_ids)
            if images.given:
                on_demand = tiles_on_demand and self._may_wait(cache, hr_capacity)
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

    def _cache_to_use(self, use_cache: bool | None, cache: Cache | None) -> tuple[bool, Cache | None]:
        """Return whether to use a key/value cache, and the one to use."""
        if use_cache is None:
            use_cache = getattr(self.config.text_config, "use_cache", True) and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config.text_config)
        return bool(use_cache), cache

    def _image_positions(self, input_ids: torch.Tensor, shape: CallShape, prompt_length: int | None) -> torch.Tensor:
        """Return [B, N] bool, True for an image token of the prompt, not for one that the model wrote or drafted."""
        is_image: torch.Tensor = input_ids == self.config.image_token_id
        if prompt_length is not None:
            is_image[:, max(0, prompt_length - shape.past) :] = False
        return is_image

    def _embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids. An image token may lie outside the vocabulary; what is embedded for it does not matter."""
        embedding, image = self.get_input_embeddings(), self.config.image_token_id
        if image >= len(embedding.weight):
            input_ids = input_ids.masked_fill(input_ids == image, 0)
        embedded: torch.Tensor = embedding(input_ids)
        return embedded

    def _may_wait(self, cache: Cache | None, hr_capacity: int | None) -> bool:
        """Whether tiles can be encoded when a selection reaches them: not in fixed shapes, nor with gradients."""
        kept = HRCache.beside(cache)
        capacity = hr_capacity if kept is None else kept.capacity
        return self.config.system == "flexattn" and capacity is None and not torch.is_grad_enabled()

    def _embed_images(
        self, images: ImageInputs, is_image: torch.Tensor, inputs_embeds: torch.Tensor, on_demand: bool
    ) -> tuple[torch.Tensor, NewImages | None]:
        """Return the embeddings with the images' tokens in place, and what the mechanism must know of the images."""
        images.check_rows(len(is_image))
        tokens = self.config.image_tokens if images.have_hr else self.config.lr_grid.cells
        spans = image_spans(is_image[:: images.rows_per_prompt], images.count, tokens)
        if images.image_features is None:
            encoded = self.encode(images.pixel_values, images.pixel_values_hr, hr=not on_demand)
            images = images.with_features(*encoded)
        if images.have_hr and self.config.flexattn is not None:
            images.check_hr(self.config)
        rows = images.image_features
        assert rows is not None
        if images.hr_features is not None and self.config.system == "hd":
            rows = torch.cat([rows, images.hr_features.to(rows)], dim=1)
        if images.rows_per_prompt > 1:
            rows = _for_each_row(rows, spans, images.rows_per_prompt)
        inputs_embeds = inputs_embeds.masked_scatter(is_image.unsqueeze(-1), rows.to(inputs_embeds))
        if not images.have_hr or self._attachment is None:
            return inputs_embeds, None
        return inputs_embeds, images.new_images(spans, self.config.image_grids)

    # --------------------------------------------------------------------------------------------------- generate

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As in transformers; `flexattn_trace=Trace()` records what every step looked at.

        Raises:
            ValueError: If `assistant_early_exit` is asked for, or `stop_strings` with a tokenizer that cannot spell
                them.
        """
        self._check_generation(kwargs)
        cache = rename_cache(kwargs)
        alternatives = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt = next((given for given in alternatives if given is not None), None)
        if prompt is not None and prompt.ndim >= 2:
            mask = kwargs.get("attention_mask")
            # A conversation may be continued with its new tokens alone; then the mask covers what is in the cache too.
            new_alone = cache is not None and mask is not None and mask.shape[1] != prompt.shape[1]
            past = int(cache.get_seq_length()) if new_alone and cache is not None else 0
            kwargs.setdefault("prompt_length", prompt.shape[1] + past)
        return super().generate(inputs, **kwargs)

    def _check_generation(self, options: dict[str, Any]) -> None:
        """Raise ValueError for options of `generate` that would fail later, and not say why."""
        defaults = options.get("generation_config") or self.generation_config

        def option(name: str) -> Any:
            return options[name] if options.get(name) is not None else getattr(defaults, name, None)

        if option("assistant_early_exit") is not None:
            raise ValueError(
                "assistant_early_exit is not supported by LLaVA; use assistant_model or prompt_lookup_num_tokens"
            )
        tokenizer = options.get("tokenizer")
        if option("stop_strings") is not None and tokenizer is not None and not _spells(tokenizer, "abcdef"):
            raise ValueError(
                "stop_strings needs a tokenizer that can spell any text, but this one knows whole words only; use "
                "eos_token_id or stopping_criteria"
            )

    def _get_candidate_generator(
        self, *args: Any, assistant_model: Any = None, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """Assisted decoding: an assistant of another kind does not get the arguments that it does not know."""
        if assistant_model is not None and not isinstance(assistant_model, FlexAttnLlavaForConditionalGeneration):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in _OWN_ARGUMENTS}
        return super()._get_candidate_generator(
            *args, assistant_model=assistant_model, model_kwargs=model_kwargs, **kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids: Any, is_first_iteration: bool = False, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Pass the images to the first call only; afterwards they live in the cache and beside it."""
        # By name in the signature: transformers looks for it before it allows prompts of embeddings.
        kwargs["inputs_embeds"] = inputs_embeds
        images = {name: kwargs.pop(name) for name in _ONCE if name in kwargs}
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        cache = kwargs.get(CACHE_ARGUMENT)
        if isinstance(cache, DynamicCache) and cache.get_seq_length() == 0:  # an assistant's first call
            is_first_iteration = True
        if is_first_iteration or not kwargs.get("use_cache", True):
            return inputs | images
        return {name: value for name, value in inputs.items() if name not in _ONCE}

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Compile decoding with a static cache only if what the images add has a fixed size too (`hr_capacity`)."""
        images = HRCache.beside(model_kwargs.get(CACHE_ARGUMENT))
        grows = images is not None and images.capacity is None
        if any(model_kwargs.get(name) is not None for name in ("pixel_values_hr", "hr_features")):
            grows = self.config.system == "flexattn" and model_kwargs.get("hr_capacity") is None
        compiles: bool = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        return compiles and not grows

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Raise between two steps what a compiled step could not raise itself."""
        images = HRCache.beside(model_kwargs.get(CACHE_ARGUMENT))
        if images is not None and images.capacity is not None:
            images.check_overflow()
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """Return the padding mask as it is; with static caches, transformers would turn it into its own kind here."""
        return attention_mask

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Repeat the rows for beams and samples, but not the images, which the rows of a prompt share."""
        images = {name: kwargs.pop(name) for name in _IMAGE_ARGUMENTS if kwargs.get(name) is not None}
        if expand_size > 1 and images:
            images["rows_per_prompt"] = expand_size
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | images


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


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:  # NaN too
        raise ValueError(f"hr_alpha is {alpha}; it must be a weight from 0 to 1")


def _check_pixels(name: str, pixels: torch.Tensor, size: int) -> None:
    if pixels.ndim != 4 or list(pixels.shape[1:]) != [3, size, size]:
        raise ValueError(f"{name} has shape {list(pixels.shape)}; it must be [n, 3, {size}, {size}]")


def _for_each_row(images: torch.Tensor, spans: list[list[Span]], rows_per_prompt: int) -> torch.Tensor:
    """Repeat [n, ...] images in the order of the prompts to that of the batch's rows, which repeat the prompts."""
    groups = torch.arange(len(images)).split([len(prompt) for prompt in spans])
    order = torch.cat([group for group in groups for _ in range(rows_per_prompt)])
    return images[order.to(images.device)]


def _spells(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer gives a text back, as transformers needs it to match stop strings."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text in tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids))


AutoModelForImageTextToText.register(FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration)
checkpoints.register_key_conversion(FlexAttnLlavaForConditionalGeneration)
