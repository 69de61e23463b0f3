"""A model of transformers that FlexAttention was attached to: its own forward and generate, with high-resolution (HR)
images as further arguments.

The class of the model object is replaced by a subclass of the same name, so that its type, its name and its
configuration still say what it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers import Cache, PreTrainedModel

from flexattn_cuda import profiling
from flexattn_cuda.checkpoints import adapters
from flexattn_cuda.families.arguments import IMAGE_ARGUMENTS, ForwardArguments
from flexattn_cuda.families.calls import (
    cache_to_use,
    check_valid_rect,
    embed_text,
    image_positions,
    image_spans,
    may_wait,
    place,
)
from flexattn_cuda.families.family import Family, Pixels, PromptWithImages
from flexattn_cuda.families.generation import POSITIONS_COME_FIRST, HRGeneration
from flexattn_cuda.mechanism.attach import Attachment
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT, rename_cache
from flexattn_cuda.mechanism.call import CallShape, HRRequest, NewImages, Span, check_keeps_all
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.grid import ImageGrids


class AttachedModel(HRGeneration):
    """Mixed into the class of a model that FlexAttention was attached to."""

    attachment: Attachment
    hr_family: Family
    attached_to: ClassVar[type[PreTrainedModel]]  # the model's own class

    @property
    def flexattn_settings(self) -> FlexAttnConfig:
        """Settings of the mechanism."""
        return self.hr_family.settings

    def _shared_by_rows(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        if all(arguments.get(name) is None for name in IMAGE_ARGUMENTS):
            return ()
        shared = set(self.hr_family.image_arguments) - set(self.hr_family.row_arguments)
        return (*IMAGE_ARGUMENTS, "valid_rect", *shared)

    def prepare_inputs_for_generation(
        self, input_ids: Any, is_first_iteration: bool = False, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers; with older versions the positions of images are left to forward."""
        self._resume(kwargs.get(CACHE_ARGUMENT))
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration, inputs_embeds, **kwargs)
        if not POSITIONS_COME_FIRST and self._images_shape_positions(inputs):
            inputs.pop("position_ids", None)
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
        """As in newer transformers, which takes image tokens for text in a later turn, or without mm_token_type_ids."""
        cache = model_kwargs.get(CACHE_ARGUMENT)
        self._resume(cache)
        if not self._images_shape_positions(model_kwargs):
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        family, past = self.hr_family, 0 if cache is None else int(cache.get_seq_length())
        new_ids = model_kwargs.get("input_ids", inputs_tensor)[:, past - model_kwargs["prompt_length"] :]
        grids = family.grids(model_kwargs["pixel_values_hr"])
        positions = family.position_ids(PromptWithImages(new_ids, model_kwargs.get("attention_mask"), grids, 1, past))
        assert positions is not None
        return functional.pad(positions, (past, 0))  # nothing reads the positions of what is in the cache

    def _images_shape_positions(self, arguments: dict[str, Any]) -> bool:
        """Return whether a call brings images that the positions of its tokens depend on."""
        return arguments.get("pixel_values_hr") is not None and self.hr_family.position_axes > 1

    def _call(self, arguments: dict[str, Any]) -> Any:
        """Run the model's own forward, with the images in place and the mechanism told of them."""
        own = ForwardArguments.pop_from(arguments)
        cache = rename_cache(arguments)
        sequence = arguments.get("inputs_embeds") if arguments.get("input_ids") is None else arguments["input_ids"]
        if sequence is None:
            return self.attached_to.forward(self, **arguments)
        new = None
        if own.have_hr:
            use_cache, cache = cache_to_use(self, arguments.get("use_cache"), cache, have_hr=True)
            arguments |= {"use_cache": use_cache, CACHE_ARGUMENT: cache}
        shape = CallShape.of(sequence, cache, own.prompt_length, arguments.get("cache_position"))
        if shape.past:
            self._resume(cache)
        if own.have_hr:
            check_keeps_all(cache, shape.past + shape.queries)
        if own.have_images:
            new = self._embed_images(own, arguments, shape)
        arguments["flexattn_request"] = HRRequest(
            shape=shape,
            images=new,
            labels=arguments.get("labels"),
            prompt_length=own.prompt_length,
            alpha=own.hr_alpha,
            trace=own.flexattn_trace,
            cached=own.hr_cache and cache is not None and not torch.is_grad_enabled(),
            capacity=own.hr_capacity,
            on_demand=own.tiles_on_demand and may_wait(cache, own.hr_capacity),
        )
        with profiling.phase(shape.phase):
            output = self.attached_to.forward(self, **arguments)
        if new is not None and (images := HRCache.beside(cache)) is not None:
            images.position_offsets = self.hr_family.position_offsets
        return output

    def _resume(self, cache: Cache | None) -> None:
        """Give the model the position offsets of this conversation; it may have run another one since.

        Raises:
            ValueError: If `refit` has taken projections that the conversation needs.
        """
        images = HRCache.beside(cache)
        if images is None:
            return
        began, now = images.settings.first_layer, self.flexattn_settings.first_layer
        if began < now:
            raise ValueError(
                f"this conversation began with high-resolution tokens from layer {began} on, but refit has moved them "
                f"to layer {now}; start again with a new cache"
            )
        if images.position_offsets is not None:
            self.hr_family.position_offsets = images.position_offsets

    def encode(self, pixel_values_hr: Pixels, **views: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Encode images that are asked about more than once: `image_features` and `hr_features` of `forward`.

        Args:
            pixel_values_hr: As in `forward`.
            views: The images' low-resolution view, as the family's processor names its parts; made from
                `pixel_values_hr` when absent.

        Returns:
            LR tokens [S_h*S_w, D] and HR tokens [h*w, D] of each image. No gradient flows through the HR tokens.

        Raises:
            ValueError: If the images do not have a size that the model takes.
        """
        family = self.hr_family
        grids = family.grids(pixel_values_hr)
        lr = family.encode_lr(pixel_values_hr, views)
        return lr, [family.encode_hr(image, of_image) for image, of_image in zip(pixel_values_hr, grids)]

    def _embed_images(self, own: ForwardArguments, arguments: dict[str, Any], shape: CallShape) -> NewImages | None:
        """Replace token ids and images among the arguments by embeddings; return what the mechanism must know."""
        family, input_ids, pixels = self.hr_family, arguments.get("input_ids"), own.pixel_values_hr
        if input_ids is None:
            raise ValueError("images need input_ids: the image tokens say where they stand in the prompt")
        if arguments.get("mm_encoder_outputs"):
            raise ValueError("mm_encoder_outputs came with pixel_values_hr; pass the images as pixel_values")
        if shape.past and not family.later_images:
            raise ValueError(
                f"the cache holds {shape.past} positions before these images, but a {self.config.model_type} model, "
                "whose image tokens see each other in both directions, takes images with the first prompt alone; start "
                "again with a new cache"
            )
        _check_call(own, arguments)
        grids = _checked_grids(family, own)
        is_image = image_positions(input_ids, family.image_token_id, shape, own.prompt_length)
        spans = image_spans(is_image[:: own.rows_per_prompt], [image.lr.cells for image in grids])
        if own.valid_rect is not None:
            check_valid_rect(own.valid_rect, [image.lr for image in grids])
        if own.rows_per_prompt > 1:
            arguments |= _of_prompts(arguments, family.row_arguments, spans, own.rows_per_prompt)
        lr_tokens = own.image_features
        if lr_tokens is None:
            assert pixels is not None
            lr_tokens = family.encode_lr(pixels, arguments)
        embedded = embed_text(self, input_ids, family.image_token_id)
        if arguments.get("position_ids") is None:
            prompt = PromptWithImages(
                input_ids, arguments.get("attention_mask"), grids, own.rows_per_prompt, shape.past
            )
            positions = family.position_ids(prompt)
            arguments |= {} if positions is None else {"position_ids": positions}
        for name in (*family.image_arguments, "input_ids"):
            arguments.pop(name, None)
        arguments["inputs_embeds"] = place(embedded, is_image, lr_tokens, spans, own.rows_per_prompt)
        if not own.have_hr:
            return None
        return NewImages(spans, grids, pixels, own.hr_features, own.valid_rect, own.rows_per_prompt)

    def save_adapter(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write settings and HR projections, out of the model's whole state if that is given."""
        family = self.hr_family
        weights = adapters.projections(family.text_model, family.hr_layers)
        if state_dict is not None:
            weights = adapters.of_state_dict(weights, state_dict)
        adapters.write(folder, family.settings, adapters.BaseModel.of(self, family.text_model), weights)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Save the model as transformers does, and the adapter beside it.

        transformers' own class ignores the HR projections when it loads the model; `flexattn_cuda.load` and `attach`
        read them from the adapter.
        """
        if kwargs.get("is_main_process", True):
            self.save_adapter(Path(save_directory), kwargs.get("state_dict"))
        return super().save_pretrained(save_directory, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as an object of the model's own class, which is attached to again."""
        return _restore, (self.attached_to,), self.__dict__


def attached_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the subclass of a model's class whose forward takes HR images."""
    if model_class not in _CLASSES:
        body = {
            "forward": _forward(model_class),
            "attached_to": model_class,
            "__module__": model_class.__module__,
            "__qualname__": model_class.__qualname__,
            "__doc__": model_class.__doc__,
        }
        _CLASSES[model_class] = type(model_class.__name__, (AttachedModel, model_class), body)
    return _CLASSES[model_class]


_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


def _forward(model_class: type[PreTrainedModel]) -> Callable[..., Any]:
    """Return a model's forward with the arguments of this package, which its signature shows."""
    signature = inspect.signature(model_class.forward)
    parameters = list(signature.parameters.values())
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    added = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default) for f in fields(ForwardArguments)
    ]

    @functools.wraps(model_class.forward)
    def forward(self: AttachedModel, *args: Any, **kwargs: Any) -> Any:
        return self._call(dict(zip([p.name for p in named[1:]], args), **kwargs))

    forward.__signature__ = signature.replace(parameters=[*named, *added, *rest])  # type: ignore[attr-defined]
    return forward


def _restore(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    restored: PreTrainedModel = object.__new__(attached_class(model_class))
    return restored


def _of_prompts(
    arguments: dict[str, Any], names: Sequence[str], spans: list[list[Span]], rows_per_prompt: int
) -> dict[str, torch.Tensor]:
    """Return named arguments with the images of each prompt once; `generate` repeats them for each of its rows."""
    counts = torch.tensor([len(prompt) for prompt in spans])
    first = (counts.cumsum(0) - counts) * rows_per_prompt
    index = torch.cat([torch.arange(begin, begin + count) for begin, count in zip(first.tolist(), counts.tolist())])
    repeated = {name: arguments[name] for name in names if arguments.get(name) is not None}
    return {
        name: value[index.to(value.device)]
        for name, value in repeated.items()
        if len(value) == rows_per_prompt * counts.sum()
    }


def _checked_grids(family: Family, own: ForwardArguments) -> list[ImageGrids]:
    """Return the grids of the images of a call; ValueError for images that would be misread."""
    images = {name: getattr(own, name) for name in ("pixel_values_hr", "image_features", "hr_features")}
    for name, values in images.items():
        if values is not None:
            _check_tensors(name, values)
    if own.pixel_values_hr is not None:
        return family.grids(own.pixel_values_hr)
    assert own.image_features is not None
    grids = family.feature_grids(len(own.image_features))
    width = family.text_model.config.hidden_size
    expected = {"image_features": [image.lr.cells for image in grids], "hr_features": [g.hr.cells for g in grids]}
    for name, cells in expected.items():
        given = None if images[name] is None else [tuple(tokens.shape) for tokens in images[name]]
        if given is not None and given != [(number, width) for number in cells]:
            raise ValueError(
                f"{name} holds {len(given)} images of shape {list(given[0])}; these prompts and settings take "
                f"{len(cells)} of {[cells[0], width]}"
            )
    return grids


def _check_tensors(name: str, values: Any) -> None:
    """Raise ValueError unless an argument holds at least one image, in floating point."""
    if not isinstance(values, (torch.Tensor, list, tuple)) or not all(isinstance(one, torch.Tensor) for one in values):
        raise ValueError(
            f"{name} is a {type(values).__name__}; it must be a tensor or a list of tensors, as "
            "flexattn_cuda.processor_for(model) makes them of images"
        )
    if not len(values):
        raise ValueError(f"{name} holds no images; leave it out for prompts without")
    if dtypes := {image.dtype for image in values if not image.is_floating_point()}:
        raise ValueError(
            f"{name} is {dtypes.pop()}; it must be normalised, in floating point: use the model's processor"
        )


def _check_call(own: ForwardArguments, arguments: dict[str, Any]) -> None:
    """Raise ValueError for a batch that would be misread."""
    rows = len(arguments["input_ids"])
    if arguments.get("inputs_embeds") is not None:
        raise ValueError("both input_ids and inputs_embeds came with images; pass input_ids alone")
    if own.image_features is not None and arguments.get("pixel_values") is not None:
        raise ValueError("pass either pixels or features of the images")
    if own.rows_per_prompt < 1 or rows % own.rows_per_prompt:
        raise ValueError(f"the batch has {rows} rows, which are not prompts of {own.rows_per_prompt} rows each")
    mask = arguments.get("attention_mask")
    padded = isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask[:, -1].all())
    if own.have_hr and padded and arguments.get("labels") is None:
        raise ValueError(
            "attention_mask has padding on the right, where the row that sees high-resolution tokens should be; pad on "
            "the left (padding_side='left'), or pass labels"
        )
