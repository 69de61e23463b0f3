"""LLaVA with FlexAttention, on transformers' own LLaVA: nothing of its modelling code is repeated here.

What is added: two projections on the existing attention modules of the layers that attend to high-resolution (HR)
tokens, an attention function (attention.py), and one state object per forward call (state.py). The systems that the paper
compares with are the same class: LLaVA-HD is a longer image in the sequence, LLaVA-XAttn has layers of its own
(cross_attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForImageTextToText,
    Cache,
    DynamicCache,
    LlavaForConditionalGeneration,
)

from flexattn_cuda import checkpoints, profiling
from flexattn_cuda.baselines.cross_attention import CrossAttentionLayer, HRTokens
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.families.llava.vision import cut_into_tiles, encode_images, encode_tiles
from flexattn_cuda.mechanism import attention
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.context import Call, Rows
from flexattn_cuda.mechanism.rotary import hr_rotary_tables
from flexattn_cuda.mechanism.trace import Trace

_IMAGE_ARGUMENTS = (
    "pixel_values",
    "pixel_values_hr",
    "image_features",
    "hr_features",
    "valid_rect",
)
_WITH_IMAGES = (*_IMAGE_ARGUMENTS, "rows_per_prompt")
_OWN_ARGUMENTS = (
    *_WITH_IMAGES,
    "prompt_length",
    "flexattn_trace",
    "hr_alpha",
    "hr_cache",
    "hr_capacity",
    "tiles_on_demand",
)


class FlexAttnLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA whose later layers also attend to selected tokens of the high-resolution image, or one of the systems that
    FlexAttention is compared with (`FlexAttnConfig.system`).

    Without HR pixels, or with `flexattn_config=None`, it computes what transformers' LLaVA computes.
    """

    config_class = FlexAttnLlavaConfig
    config: FlexAttnLlavaConfig
    call_class: type[Call] = Call  # replaced where nothing can be read back, in flops.py
    _no_split_modules = [
        *(LlavaForConditionalGeneration._no_split_modules or []),
        CrossAttentionLayer.__name__,
    ]
    # The released format has HR projections in every layer, and those of another system are never used.
    _keys_to_ignore_on_load_unexpected = [r"self_attn\.[kv]_proj_hd\.", r"\.cross_attn\."]

    def __init__(self, config: FlexAttnLlavaConfig):
        config.check()
        super().__init__(config)
        language_model = self.model.language_model
        language_model.set_attn_implementation(attention.NAME)
        for layer in config.hr_layers:
            if config.system == "xattn":
                language_model.layers[layer] = CrossAttentionLayer(language_model.config, layer)
                continue
            module = language_model.layers[layer].self_attn
            for name in ("k_proj", "v_proj"):
                plain = getattr(module, name)
                setattr(
                    module,
                    f"{name}_hd",
                    nn.Linear(plain.in_features, plain.out_features, plain.bias is not None),
                )
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

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_hr: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        hr_features: torch.Tensor | None = None,
        valid_rect: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
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
        **kwargs: Any,
    ):
        """One forward call; what transformers' LLaVA documents is as there.

        Args:
            input_ids: [B, N]; every image stands as S*S ids `config.image_token_id` in a row, with LLaVA-HD as S*S + h*h.
            pixel_values: [n, 3, lowres, lowres] normalised images in the order of the prompt; made from
                `pixel_values_hr` when absent.
            pixel_values_hr: [n, 3, highres, highres] the same images; without them no row sees HR tokens.
            image_features, hr_features: [n, S*S, D] and [n, h*h, D], from `encode`, instead of the pixels: for images that
                are asked about more than once.
            valid_rect: [n, 4] int, (top, left, bottom, right) of the image inside its padding, in cells of the S x S
                grid, half-open; the whole grid when absent.
            labels: [B, N]; the rows that predict an answer token (label other than -100) see HR tokens, each with its
                own selection, mixed in with weight `hr_alpha`. Without labels: the last prompt row and later ones.
            prompt_length: Positions of the sequence up to the end of the prompt, where it is not the end of this call
                or, with a cache, of the previous one (a prompt in chunks, or drafts to verify). `generate` sets it.
            flexattn_trace: Records maps and selections.
            hr_cache: Project an HR token once per layer and keep its key and value beside the cache; otherwise, and where
                gradients are recorded, every call projects what it attends to. The answers are the same, but for rounding.
            tiles_on_demand: Encode a tile of `pixel_values_hr` when the selection first reaches into it; otherwise, and
                where gradients are recorded, all of them at once. The answers are the same, but for rounding.
            hr_capacity: FlexAttention only, for CUDA graphs and compiled decoding (a static cache): slots of each layer's pool
                of HR keys, shared by the batch, given with the images. Pools then never grow, all tiles are encoded at
                once, and a decode step reads nothing back; it may newly select 256 tokens of a layer for each row.
                `hr_cache.PoolOverflow` tells that a selection did not fit.
            rows_per_prompt: So many rows of the batch that follow each other are beams of one prompt. The images come
                once for each prompt, and its rows share all that is made of them. `generate` sets it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if pixel_values is not None or pixel_values_hr is not None:
            if image_features is not None or hr_features is not None:
                raise ValueError("pass either pixels or features of the images")
        elif hr_features is not None and image_features is None:
            raise ValueError("hr_features need image_features: the image's low-resolution tokens")
        if input_ids is None and any(x is not None for x in (pixel_values, pixel_values_hr, image_features)):
            raise ValueError("images need input_ids: their places in the prompt are the image tokens")

        if hr_capacity is not None and hr_capacity < 1:
            raise ValueError(f"hr_capacity is {hr_capacity}; it must be at least 1, or None for pools that grow")

        sequence = input_ids if input_ids is not None else inputs_embeds
        device, (batch, queries) = sequence.device, sequence.shape[:2]
        if use_cache is None:
            use_cache = getattr(self.config.text_config, "use_cache", True) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        images = HRCache.beside(past_key_values)
        # The length of a static cache lies on the device: a compiled decode step does without it.
        compiled = torch.compiler.is_compiling() and queries == 1 and past_key_values is not None
        past = 0 if compiled else _length(past_key_values, kwargs.get("cache_position"))
        # After the prompt an image token is one that the model wrote, or a draft copied from the prompt.
        decoding = compiled or (past > 0 and (queries == 1 if prompt_length is None else past >= prompt_length))

        if images is not None and not compiled:
            images = images.cropped(past_key_values, past)
        spans: list[list[tuple[int, int]]] = []
        if input_ids is not None:
            is_image = input_ids == self.config.image_token_id
            embed = self.get_input_embeddings()
            # The image token's id may lie outside the vocabulary.
            outside = self.config.image_token_id >= len(embed.weight)
            inputs_embeds = embed(input_ids.masked_fill(is_image, 0) if outside else input_ids)
            if prompt_length is not None:
                is_image[:, max(0, prompt_length - past) :] = False  # written by the model, or drafts
            given = next((x for x in (pixel_values, pixel_values_hr, image_features) if x is not None), None)
            if given is not None:
                if rows_per_prompt < 1 or batch % rows_per_prompt:
                    raise ValueError(
                        f"the batch has {batch} rows, which are not prompts of {rows_per_prompt} rows each"
                    )
                has_hr = pixel_values_hr is not None or hr_features is not None
                tokens = self.config.image_tokens if has_hr else self.config.lr_side**2
                spans = self._image_spans(is_image[::rows_per_prompt], given.shape[0], tokens)
                capacity = hr_capacity if images is None else images.capacity
                on_demand = (
                    tiles_on_demand
                    and self.config.system == "flexattn"
                    and capacity is None
                    and not torch.is_grad_enabled()
                )
                if image_features is None:
                    image_features, hr_features = self.encode(pixel_values, pixel_values_hr, hr=not on_demand)
                rows = image_features
                if has_hr and self.config.flexattn is not None:
                    self._check_images(len(rows), rows.shape[-1], hr_features, pixel_values_hr, valid_rect)
                if self.config.system == "hd" and has_hr:
                    rows = torch.cat([rows, hr_features.to(rows)], dim=1)
                if rows_per_prompt > 1:
                    rows = _for_each_row(rows, spans, rows_per_prompt)
                inputs_embeds = inputs_embeds.masked_scatter(is_image.unsqueeze(-1), rows.to(inputs_embeds))
            elif not decoding and bool(is_image.any()):
                raise ValueError("the prompt has image tokens, but no pixel_values came with it")

        if (hr_features is not None or pixel_values_hr is not None) and self.config.hr_layers:
            places = None if position_ids is None else position_ids[::rows_per_prompt]
            new = self._high_resolution(hr_features, pixel_values_hr, valid_rect, spans, places, past, inputs_embeds)
            new.capacity = hr_capacity
            images = new if images is None else images.joined_with(new)
        call = hr_tokens = None
        if images is not None:
            if batch % images.prompts:
                raise ValueError(f"this call has {batch} rows, but the cache holds images of {images.prompts} prompts")
            if not compiled:
                if prompt_length is None:
                    prompt_length = past + queries if queries > 1 or past == 0 else images.prompt_length
                images.prompt_length, images.length = prompt_length, past + queries
                if past_key_values is not None:
                    images.keep_beside(past_key_values)
            cached = hr_cache and past_key_values is not None and not torch.is_grad_enabled()
            if images.settings.system == "xattn":
                hr_tokens = HRTokens(images, cached)
            else:
                rows = (
                    Rows.of_a_token(batch, device)
                    if compiled
                    else self._rows(labels, past, batch, queries, prompt_length, device)
                )
                if rows is not None:
                    layers = self.config.text_config.num_hidden_layers
                    reads_back = not (cached and decoding and queries == 1 and images.capacity is not None)
                    call = self.call_class(
                        images,
                        rows,
                        layers,
                        hr_alpha,
                        flexattn_trace,
                        self._encode_tiles,
                        cached,
                        reads_back,
                    )

        with profiling.phase("decode" if decoding and queries == 1 else "prefill"):
            return super().forward(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                flexattn=call,
                hr_tokens=hr_tokens,
                **kwargs,
            )

    def encode(
        self,
        pixel_values: torch.Tensor | None,
        pixel_values_hr: torch.Tensor | None = None,
        hr: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Image tokens of n images: low-resolution [n, S*S, D] and, where HR pixels are given, HR [n, h*h, D].

        No gradient flows through the HR tokens, as in the released code, but through those in the sequence of LLaVA-HD.
        Arguments as in `forward`; hr: whether to encode the HR pixels too, or only to make `pixel_values` of them where
        these are absent.
        """
        config, hr_features = self.config.flexattn, None
        if pixel_values_hr is not None and config is not None:
            expected = [3, config.highres_size, config.highres_size]
            if list(pixel_values_hr.shape[1:]) != expected or pixel_values_hr.ndim != 4:
                raise ValueError(
                    f"pixel_values_hr has shape {list(pixel_values_hr.shape)}; it must be [n, {str(expected)[1:]}"
                )
            if hr:
                with torch.set_grad_enabled(torch.is_grad_enabled() and config.system == "hd"):
                    hr_features = torch.stack(
                        [encode_tiles(self.model, image, config.zoom) for image in pixel_values_hr]
                    )
        size = self.config.vision_config.image_size if config is None else config.lowres_size
        if pixel_values is None:
            pixel_values = functional.interpolate(
                pixel_values_hr.float(),
                size=(size, size),
                mode="bilinear",
                align_corners=False,
                antialias=True,
            )
        if list(pixel_values.shape[1:]) != [3, size, size]:
            raise ValueError(f"pixel_values has shape {list(pixel_values.shape)}; it must be [n, 3, {size}, {size}]")
        return encode_images(self.model, pixel_values), hr_features

    def _rows(
        self,
        labels: torch.Tensor | None,
        past: int,
        batch: int,
        queries: int,
        prompt_length: int,
        device: torch.device,
    ) -> Rows | None:
        """The rows of a call that see HR tokens, None where there are none."""
        if labels is None:
            return Rows.of_generation(self.config.flexattn, batch, past, queries, prompt_length, device)
        rows = Rows.of_answers(self.config.flexattn, labels)
        return None if rows.listed.shape[1] == 0 else rows

    @torch.no_grad()
    def _encode_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        return encode_images(self.model, tiles)

    def _image_spans(self, is_image: torch.Tensor, count: int, tokens: int) -> list[list[tuple[int, int]]]:
        """Per row of the batch, where each image's `tokens` begin and end."""
        spans: list[list[tuple[int, int]]] = []
        for row in is_image.cpu():
            at = row.nonzero().flatten()
            begins = at[::tokens]
            if len(at) % tokens or any(
                int(at[i * tokens + tokens - 1]) - int(b) != tokens - 1 for i, b in enumerate(begins)
            ):
                raise ValueError(
                    f"a row of the prompt has {len(at)} image tokens; every image takes {tokens} of them, without a gap"
                )
            spans.append([(int(begin), int(begin) + tokens) for begin in begins])
        places = sum(len(row) for row in spans)
        if places != count:
            raise ValueError(f"the prompts have room for {places} images, but {count} came with them")
        return spans

    def _check_images(
        self,
        count: int,
        width: int,
        features: torch.Tensor | None,
        images: torch.Tensor | None,
        live: torch.Tensor | None,
    ) -> None:
        """ValueError where what came with `count` images is not of as many."""
        expected = [count, self.config.hr_side**2, width]
        if features is not None and list(features.shape) != expected:
            raise ValueError(f"hr_features has shape {list(features.shape)}; for these prompts it must be {expected}")
        if images is not None and len(images) != count:
            raise ValueError(f"pixel_values_hr holds {len(images)} images; these prompts have {count}")
        if live is not None and tuple(live.shape) != (count, 4):
            raise ValueError(f"valid_rect has shape {list(live.shape)}; it must be {[count, 4]}")

    @profiling.in_phase("lay_out_hr_tokens")
    def _high_resolution(
        self,
        features: torch.Tensor | None,
        images: torch.Tensor | None,
        live: torch.Tensor | None,
        spans: list[list[tuple[int, int]]],
        position_ids: torch.Tensor | None,
        past: int,
        inputs_embeds: torch.Tensor,
    ) -> HRCache:
        """Lays the images' HR tokens out, prompt by prompt: their features, or the images whose tiles wait to be encoded."""
        config, side, hr_side = self.config.flexattn, self.config.lr_side, self.config.hr_side
        device, dtype = inputs_embeds.device, inputs_embeds.dtype
        batch, slots = len(spans), max(1, max(len(row) for row in spans))
        head_dim = self.model.language_model.layers[0].self_attn.head_dim
        rotated = hr_side**2 if config.system == "flexattn" else 0  # cross-attention has no positions
        state = HRCache(
            settings=config,
            lr_side=side,
            features=torch.zeros(batch, slots, hr_side**2, inputs_embeds.shape[-1], device=device, dtype=dtype),
            cos=torch.zeros(batch, slots, rotated, head_dim, device=device, dtype=dtype),
            sin=torch.zeros(batch, slots, rotated, head_dim, device=device, dtype=dtype),
            ranges=torch.zeros(batch, slots, 2, dtype=torch.int32, device=device),
            live=torch.zeros(batch, slots, 4, dtype=torch.int32, device=device),
        )
        whole = torch.tensor([0, 0, side, side], dtype=torch.int32)
        image = 0
        for row, places in enumerate(spans):
            for slot, (begin, end) in enumerate(places):
                if features is not None:
                    state.features[row, slot] = features[image].detach().to(state.features)
                else:
                    tiles = cut_into_tiles(images[image].clone(), config.zoom)  # the caller may use the tensor again
                    state.waiting |= {(row, slot, tile): pixels for tile, pixels in enumerate(tiles)}
                state.last_end = max(state.last_end, past + end)
                state.live[row, slot] = (whole if live is None else live[image]).to(device, torch.int32)
                state.ranges[row, slot] = torch.tensor([past + begin, past + end], dtype=torch.int32)
                image += 1
                if not rotated:
                    continue
                positions = (
                    torch.arange(past + begin, past + end, device=device)
                    if position_ids is None
                    else position_ids[row if position_ids.shape[0] > 1 else 0, begin:end]
                )
                tables = self.model.language_model.rotary_emb(inputs_embeds, position_ids=positions[None])
                state.cos[row, slot], state.sin[row, slot] = hr_rotary_tables(
                    tuple(table[0] for table in tables), hr_side, config.hr_position
                )
        state.features, state.cos, state.sin = (t.flatten(1, 2) for t in (state.features, state.cos, state.sin))
        return state

    # --------------------------------------------------------------------------------------------------- generate

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any):
        """As in transformers; `flexattn_trace=Trace()` records what every step looked at."""
        prompt = next(
            (x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None),
            None,
        )
        if prompt is not None and prompt.ndim >= 2:
            cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
            # A conversation may be continued with its new tokens alone; then the mask covers what is in the cache too.
            new_alone = cache is not None and mask is not None and mask.shape[1] != prompt.shape[1]
            kwargs.setdefault("prompt_length", prompt.shape[1] + (int(cache.get_seq_length()) if new_alone else 0))
        return super().generate(inputs, **kwargs)

    def _get_candidate_generator(
        self, *args: Any, assistant_model: Any = None, model_kwargs: dict[str, Any], **kwargs: Any
    ):
        """Assisted decoding: an assistant of another kind is not told of what it does not know."""
        if assistant_model is not None and not isinstance(assistant_model, FlexAttnLlavaForConditionalGeneration):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in _OWN_ARGUMENTS}
        return super()._get_candidate_generator(
            *args, assistant_model=assistant_model, model_kwargs=model_kwargs, **kwargs
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        is_first_iteration: bool = False,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ):
        kwargs["inputs_embeds"] = (
            inputs_embeds  # by name: transformers looks for it before it allows prompts of embeddings
        )
        images = {name: kwargs.pop(name) for name in _WITH_IMAGES if name in kwargs}
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        # Images come in once; afterwards they live in the key/value cache and beside it.
        cache = kwargs.get("past_key_values")
        is_first_iteration |= (
            isinstance(cache, DynamicCache) and cache.get_seq_length() == 0
        )  # an assistant's first call
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs |= images
        else:
            for name in _WITH_IMAGES:
                inputs.pop(name, None)
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ):
        """Between two steps: what a compiled step could not say itself."""
        images = HRCache.beside(model_kwargs.get("past_key_values"))
        if images is not None and images.capacity is not None:
            images.check_overflow()
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
        """Static caches: transformers would build the mask before the call; ours is made from the padding inside it."""
        return attention_mask

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ):
        """Beams and several samples repeat rows; the rows of a prompt share its images, which are not repeated."""
        images = {name: kwargs.pop(name) for name in _IMAGE_ARGUMENTS if kwargs.get(name) is not None}
        if expand_size > 1 and images:
            images["rows_per_prompt"] = expand_size
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | images


def _length(cache: Cache | None, cache_position: torch.Tensor | None) -> int:
    """Positions in the cache. transformers 5.0 says where a call begins; its static cache takes keys of zeros for unwritten."""
    if cache is None:
        return 0
    return int(cache.get_seq_length() if cache_position is None else cache_position[0])


def _for_each_row(images: torch.Tensor, spans: list[list[tuple[int, int]]], rows_per_prompt: int) -> torch.Tensor:
    """[n, ...] images in the order of the prompts -> in the order of the batch's rows, which repeat the prompts."""
    groups = torch.arange(len(images)).split([len(prompt) for prompt in spans])
    order = torch.cat([group for group in groups for _ in range(rows_per_prompt)])
    return images[order.to(images.device)]


AutoModelForImageTextToText.register(FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration)
checkpoints.register_key_conversion(FlexAttnLlavaForConditionalGeneration)
