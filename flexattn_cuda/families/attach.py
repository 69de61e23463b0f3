"""Attach FlexAttention to a vision-language model of transformers.

model = AutoModelForImageTextToText.from_pretrained("OpenGVLab/InternVL3-1B-hf")
flexattn_cuda.attach(model)
processor = flexattn_cuda.processor_for(model)
answer = flexattn_cuda.ask(model, processor, "image.jpg", "Which digits are on the red sign?")
flexattn_cuda.save_adapter(model, "my-adapter")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from flexattn_cuda.checkpoints import HubOptions, adapters
from flexattn_cuda.families.attached import AttachedModel, attached_class
from flexattn_cuda.families.family import Family
from flexattn_cuda.families.registry import family_of
from flexattn_cuda.mechanism import attention
from flexattn_cuda.mechanism.attach import Attachment
from flexattn_cuda.mechanism.cache_argument import check_cache_argument
from flexattn_cuda.mechanism.config import PRESETS, FlexAttnConfig
from flexattn_cuda.mechanism.keys import own_projection

Model = TypeVar("Model", bound=PreTrainedModel)


def attach(
    model: Model, settings: FlexAttnConfig | str | Path = "paper", family: type[Family] | None = None, **hub: Any
) -> Model:
    """Add FlexAttention to a model, in place: its forward and generate then also take high-resolution (HR) images.

    The projections of HR tokens start as copies of the model's own. Without HR images the model computes what it
    computed before.

    Args:
        model: A vision-language model of a known family (`families/registry.py`), in any dtype, or quantised with
            bitsandbytes or torchao. Adapters of PEFT come after FlexAttention.
        settings: "paper" or "released", fitted to the model (`settings_for`); or settings, whose sizes in pixels are
            replaced by the model's (a preset's other measures too, see `FlexAttnConfig`); or an adapter that
            `save_adapter` wrote, by its folder or hub id.
        family: Describes a model whose family is not known.
        hub: revision, token, cache_dir, local_files_only, force_download and subfolder of an adapter, as in
            transformers.

    Returns:
        The model.

    Raises:
        ValueError: If the family or the language model is not supported, FlexAttention is attached already, PEFT wraps
            the model, its weights are quantised in an unknown way, the settings do not fit, or a preset would start
            afresh a model that was saved with an adapter.
        CheckpointError: If the folder holds no adapter, or one of another base model.
    """
    _check_unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}; load it by AutoModelForImageTextToText.from_pretrained")
    if isinstance(model, AttachedModel) or hasattr(model, "_attachment"):
        raise ValueError("FlexAttention is attached to this model already; load the model again for other settings")
    options = HubOptions.pop_from(hub)
    if hub:
        raise TypeError(f"attach takes no {', '.join(hub)}")
    family = family or family_of(model)
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} has no language head; load it by AutoModelForImageTextToText")
    adapter = None
    if isinstance(settings, (str, Path)) and str(settings) not in PRESETS:
        adapter = adapters.read(settings, options)
        settings = adapter.settings
    elif isinstance(settings, (str, Path)):
        _check_no_adapter(model)
    found = settings_for(model, str(settings), family) if not isinstance(settings, FlexAttnConfig) else settings
    described = family(model, found)
    described.set_settings(_fitted(found, described))
    _check_settings(described)
    if adapter is not None:
        adapter.check_base(adapters.BaseModel.of(model, described.text_model))
    _install(model, described, adapter)
    return model


def settings_for(model: PreTrainedModel, preset: str = "paper", family: type[Family] | None = None) -> FlexAttnConfig:
    """Return a preset fitted to a model: the first HR layer at the same share of the depth, sizes and pool its own.

    Args:
        model: Of a known family.
        preset: "paper" or "released".
        family: Describes a model whose family is not known.

    Raises:
        ValueError: If there is no such preset, or the family is not known.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; choose {' or '.join(PRESETS)}, or the folder of an adapter")
    settings = PRESETS[preset]()
    return _fitted(settings, (family or family_of(model))(model, settings))


def refit(model: PreTrainedModel, settings: FlexAttnConfig) -> None:
    """Give a model that FlexAttention was attached to other settings, in place.

    Layers that attend to high-resolution tokens before and after keep their projections, new ones start as copies of
    the model's own, and the others lose theirs. A conversation that is under way keeps the settings it began with; it
    is refused if a layer that it needs has lost its projections.

    Args:
        model: The model.
        settings: Its sizes in pixels are replaced by the model's.

    Raises:
        ValueError: If FlexAttention is not attached to the model, or the settings do not fit.
    """
    model = attached_model(model)
    family = model.hr_family
    before, layers = family.settings, set(family.hr_layers)
    family.set_settings(_fitted(settings, family))
    try:
        _check_settings(family)
        model.attachment.add_projections(family.text_model, torch.device("meta"))
    except BaseException:
        family.set_settings(before)
        raise
    _copy_projections(family, set(family.hr_layers) - layers)
    _remove_projections(family, layers - set(family.hr_layers))


def save_adapter(model: PreTrainedModel, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write what `attach` added to a model, as it is now: settings, projections of HR tokens and a model card.

    Args:
        model: One that FlexAttention was attached to, or PEFT's wrapper of one.
        folder: Made if it is missing; `attach(model, folder)` reads it.
        state_dict: The model's whole state, where its own parameters are shards.

    Raises:
        ValueError: If FlexAttention is not attached to the model.
        CheckpointError: If the projections are quantised, or an adapter of PEFT changes them.
    """
    model = attached_model(model)
    model.save_adapter(Path(folder), state_dict)
    family = model.hr_family
    adapters.write_card(Path(folder), family.settings, adapters.BaseModel.of(model, family.text_model))


def attached_model(model: PreTrainedModel) -> AttachedModel:
    """Return the model, out of PEFT's wrapper; ValueError if FlexAttention is not attached to it."""
    model = _base_of(model)
    if not isinstance(model, AttachedModel):
        raise ValueError(
            f"FlexAttention is not attached to this {type(model).__name__}; call flexattn_cuda.attach first"
        )
    return model


def _base_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside the wrapper that PEFT puts around it, if there is one."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def _check_unwrapped(model: PreTrainedModel) -> None:
    if _base_of(model) is not model:
        raise ValueError(
            f"this is a {type(model).__name__} of PEFT; attach FlexAttention to the model before PEFT wraps it, or "
            "merge the adapter first (merge_and_unload)"
        )


def _check_no_adapter(model: PreTrainedModel) -> None:
    folder = str(getattr(model.config, "_name_or_path", ""))
    if folder and adapters.is_in(Path(folder)):
        raise ValueError(
            f"{folder} holds an adapter of this model; attach(model, {folder!r}) takes it up, and attach(model, "
            "settings_for(model)) starts with new projections"
        )


def _fitted(settings: FlexAttnConfig, family: Family) -> FlexAttnConfig:
    """Return settings with the model's sizes in pixels and, where a preset leaves these open, its layer and pool."""
    layers = family.text_model.config.num_hidden_layers
    return _with_sizes(settings.fitted_to(layers, family.lr_size, family.lr_side), family)


def _with_sizes(settings: FlexAttnConfig, family: Family) -> FlexAttnConfig:
    """Return settings with the model's own sizes in pixels, where it has one size for all images."""
    size = family.lr_size
    if size is None:
        return settings
    return dataclasses.replace(settings, lowres_size=size, highres_size=size * settings.zoom)


def _check_settings(family: Family) -> None:
    settings, layers = family.settings, family.text_model.config.num_hidden_layers
    if settings.system != "flexattn":
        raise ValueError(f"flexattn system is {settings.system!r}; only 'flexattn' can be attached to a model")
    if settings.first_layer >= layers:
        raise ValueError(
            f"flexattn first_layer is {settings.first_layer}, but the language model has layers 0 to {layers - 1}; "
            "choose a layer that exists, or a preset, which is fitted to the model"
        )


def _install(model: PreTrainedModel, family: Family, adapter: adapters.Adapter | None) -> None:
    """Replace the class of the model, and add projections and hooks; a refusal leaves the model as it was."""
    text = family.text_model
    check_cache_argument(type(text).forward)
    attachment = Attachment(family)
    before = text.config._attn_implementation
    text.set_attn_implementation(attention.NAME)
    try:
        _add_projections(attachment, family, adapter)
    except BaseException:
        text.set_attn_implementation(before)
        raise
    attachment.add_hooks()
    model.__class__ = attached_class(type(model))
    model.attachment, model.hr_family = attachment, family


def _add_projections(attachment: Attachment, family: Family, adapter: adapters.Adapter | None) -> None:
    """Add the projections of HR tokens, copies of the model's own or an adapter's; a refusal adds none."""
    text, layers = family.text_model, family.hr_layers
    attachment.add_projections(text, torch.device("meta"))  # all of them or none; they get their values below
    try:
        _copy_projections(family, layers)
        if adapter is not None:
            adapter.load_into(text, layers)
    except BaseException:
        _remove_projections(family, layers)
        raise


@torch.no_grad()
def _copy_projections(family: Family, layers: Iterable[int]) -> None:
    """Start the projections of HR tokens in some layers as copies of the model's own, on their device, in their dtype.

    Where the model's are quantised, they are copied as numbers in its compute dtype.
    """
    text = family.text_model
    for layer in layers:
        module = text.layers[layer].self_attn
        for name in ("k_proj", "v_proj"):
            own, projection = own_projection(module, name, text.dtype), getattr(module, f"{name}_hd")
            projection.weight = nn.Parameter(own.weight.clone())
            projection.bias = None if own.bias is None else nn.Parameter(own.bias.clone())


def _remove_projections(family: Family, layers: Iterable[int]) -> None:
    """Undo what `Attachment.add_projections` did to some layers, where it did."""
    for layer in layers:
        module = getattr(family.text_model.layers[layer], "self_attn", None)  # a model without one is refused
        for name in ("k_proj_hd", "v_proj_hd", "hr_key_form"):
            if hasattr(module, name):
                delattr(module, name)
