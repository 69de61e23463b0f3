"""What `generate` of transformers must know of high-resolution (HR) images: they come with the prompt, its rows share
them, and what is made of them lives beside the key/value cache."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, GenerationMixin

from flexattn_cuda.families.arguments import IMAGE_ARGUMENTS, ForwardArguments
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT, rename_cache

OWN_ARGUMENTS = tuple(field.name for field in fields(ForwardArguments))  # that this package adds to a model's forward

# Newer transformers find the positions of a prompt before they repeat its rows for beams, older ones in every call.
POSITIONS_COME_FIRST = hasattr(GenerationMixin, "_prepare_position_ids_for_generation")


class HRGeneration(GenerationMixin):
    """Mixed into a model of transformers, in front of its own class.

    Attributes:
        _once: Arguments of forward that come with the prompt alone.
    """

    _once: ClassVar[tuple[str, ...]] = (*IMAGE_ARGUMENTS, "valid_rect", "rows_per_prompt")

    @property
    def _selects(self) -> bool:
        """Whether layers select HR tokens, whose number changes from step to step."""
        return True

    def _shared_by_rows(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        """Return the arguments that beams and samples of a prompt share."""
        raise NotImplementedError

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As in transformers; `flexattn_trace=Trace()` records what every step looked at.

        Raises:
            ValueError: If `assistant_early_exit` is asked for, `prefill_chunk_size` with HR images, or `stop_strings`
                with a tokenizer that cannot spell them.
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
            raise ValueError("assistant_early_exit is not supported; use assistant_model or prompt_lookup_num_tokens")
        if option("prefill_chunk_size") is not None and _brings_hr(options):
            raise ValueError("prefill_chunk_size would cut a prompt through its images; leave it out with HR images")
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
        if assistant_model is not None and not isinstance(assistant_model, HRGeneration):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in OWN_ARGUMENTS}
        return super()._get_candidate_generator(
            *args, assistant_model=assistant_model, model_kwargs=model_kwargs, **kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids: Any, is_first_iteration: bool = False, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Pass the images to the first call only; afterwards they live in the cache and beside it."""
        # By name in the signature: transformers looks for it before it allows prompts of embeddings.
        kwargs["inputs_embeds"] = inputs_embeds
        images = {name: kwargs.pop(name) for name in self._once if name in kwargs}
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        cache = kwargs.get(CACHE_ARGUMENT)
        if isinstance(cache, DynamicCache) and cache.get_seq_length() == 0:  # an assistant's first call
            is_first_iteration = True
        if is_first_iteration or not kwargs.get("use_cache", True):
            return inputs | images
        return {name: value for name, value in inputs.items() if name not in self._once}

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """Keep every position of a prompt with images, also in layers with a window."""
        given = any(model_kwargs.get(name) is not None for name in (CACHE_ARGUMENT, "past_key_values"))
        default = generation_config.cache_implementation is None and generation_config.use_cache
        if _brings_hr(model_kwargs) and default and not given:
            model_kwargs[CACHE_ARGUMENT] = DynamicCache()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Leave images with HR pixels to forward; transformers would encode them now, in its own format."""
        if _brings_hr(model_kwargs):
            return model_kwargs
        prepared: dict[str, Any] = super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        return prepared

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Compile decoding with a static cache only if what the images add has a fixed size too (`hr_capacity`)."""
        images = HRCache.beside(model_kwargs.get(CACHE_ARGUMENT))
        grows = images is not None and images.capacity is None
        if _brings_hr(model_kwargs):
            grows = self._selects and model_kwargs.get("hr_capacity") is None
        # A compiled step could not refuse a layer that drops positions (`check_keeps_all`).
        slides = any(getattr(model_kwargs.get(CACHE_ARGUMENT), "is_sliding", ()))
        has_images = images is not None or _brings_hr(model_kwargs)
        compiles: bool = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        return compiles and not grows and not (has_images and slides)

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
        images = {name: kwargs.pop(name) for name in self._shared_by_rows(kwargs) if kwargs.get(name) is not None}
        if expand_size > 1 and images:
            images["rows_per_prompt"] = expand_size
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | images


def _brings_hr(arguments: dict[str, Any]) -> bool:
    return any(arguments.get(name) is not None for name in ("pixel_values_hr", "hr_features"))


def _spells(tokenizer: Any, text: str) -> bool:
    """Return whether a tokenizer gives a text back, which transformers needs to match stop strings."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text in tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids))
