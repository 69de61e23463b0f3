"""Load the weights of any of the three formats into the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionModel, conversion_mapping
from transformers.models.clip import modeling_clip

from flexattn_cuda.checkpoints.config import checkpoint_format, load_config, read_config
from flexattn_cuda.checkpoints.files import first_line, refusing
from flexattn_cuda.checkpoints.generation import check_generation_config
from flexattn_cuda.checkpoints.locate import HubOptions, Part, weight_files
from flexattn_cuda.checkpoints.projections import is_projection, layer_of, start_projections
from flexattn_cuda.checkpoints.quantisation import without_projections
from flexattn_cuda.checkpoints.released import KEY_MAPPING, vision_tower_folder
from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig

# transformers 5.0 nests CLIP in a `vision_model`, and reads only names with it; later versions save names without it.
_NESTED_TOWER_KEYS = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model.language_model",
    r"^vision_tower\.(?!vision_model\.)": "model.vision_tower.vision_model.",
    r"^vision_tower\.vision_model": "model.vision_tower.vision_model",
    r"^multi_modal_projector": "model.multi_modal_projector",
}
_TRANSFORMERS = logging.getLogger("transformers.modeling_utils")
_TOWER = "model.vision_tower."
_HARMLESS = 1 << 26  # weights of a language model: so few may be created in vain


def load_weights(
    loader: Callable[..., Any],
    folder: Path,
    config: FlexAttnLlavaConfig,
    *args: Any,
    hub: HubOptions | None = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Load a model with transformers' `from_pretrained`, and fill in what the checkpoint's format lacks.

    Args:
        loader: `from_pretrained` of transformers' class.
        folder: The checkpoint's local folder.
        config: The configuration of the model; it may be of another system than the checkpoint's.
        hub: Options for a vision tower on the hub, which the released format may name.
        kwargs: For `loader`: dtype, device_map, quantization_config, ...

    Returns:
        The model, and transformers' loading info.

    Raises:
        CheckpointError: If the folder has no weights, they are damaged, or some are missing.
    """
    form = checkpoint_format(folder)
    check_generation_config(folder, config.text_config.vocab_size)
    if hub is not None and hub.variant:
        kwargs["variant"] = hub.variant
    if names := _key_mapping(form):
        kwargs["key_mapping"] = names | (kwargs.get("key_mapping") or {})
    _check_amount(folder, config, kwargs.get("variant"))
    if kwargs.get("quantization_config") is not None:
        kwargs["quantization_config"] = without_projections(kwargs["quantization_config"])
    elif form != "flexattn" and getattr(config, "quantization_config", None) is not None:
        config.quantization_config = without_projections(config.quantization_config).to_dict()
    model, info = _read_weights(loader, folder, *args, config=config, **kwargs)
    # transformers would save with the names it loaded from; this model is saved in its own format only.
    model._weight_conversions = None

    missing = set(info["missing_keys"])
    projections = _new_projections(missing, folder, config, form, hub)
    tower = {key for key in missing if key.startswith(_TOWER)} if form == "released" else set()
    if tower:
        _load_vision_tower(model, vision_tower_folder(folder, read_config(folder), hub, Part.CONFIG | Part.WEIGHTS))
    start_projections(model, projections, config)
    if projections:
        start = "copies of self-attention's" if config.flexattn.hr_init == "copy" else "random numbers"
        _TRANSFORMERS.warning(f"{folder} has no weights for {len(projections)} HR projections; they start as {start}")
    if lacking := sorted(missing - projections - tower):
        raise CheckpointError(f"{folder} lacks {len(lacking)} weights of the model, the first is {lacking[0]}")
    info["missing_keys"] = type(info["missing_keys"])()
    return model, info


@torch.no_grad()
def check_finite(folder: Path, model: torch.nn.Module) -> None:
    """Raise CheckpointError if a weight is NaN or infinite, which would spoil every answer; codes are passed over."""
    names = [name for name, weight in model.named_parameters() if _is_plain(weight)]
    extremes = [torch.stack(torch.aminmax(model.get_parameter(name))).float() for name in names]
    # One wait for each device.
    for device in {extreme.device for extreme in extremes}:
        found = [(name, extreme) for name, extreme in zip(names, extremes) if extreme.device == device]
        finite = torch.stack([extreme for _, extreme in found]).isfinite().all(1).tolist()
        if not all(finite):
            raise CheckpointError(
                f"{finite.count(False)} weights in {folder} hold NaN or infinite numbers, the first is "
                f"{found[finite.index(False)][0]}; take the checkpoint from its source again"
            )


def _is_plain(weight: torch.Tensor) -> bool:
    is_a_tensor = type(weight) in (torch.nn.Parameter, torch.Tensor) and not weight.is_meta and weight.numel() > 0
    return is_a_tensor and weight.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def register_key_conversion(model_class: type) -> None:
    """Let a class outside transformers convert names of weights as LLaVA does.

    Up to 5.16 transformers does so by itself.
    """
    mapping = conversion_mapping.get_checkpoint_conversion_mapping("llava")
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)


def _key_mapping(form: str) -> dict[str, str]:
    if form == "released":
        return KEY_MAPPING
    return _NESTED_TOWER_KEYS if form == "flexattn" and hasattr(modeling_clip, "CLIPVisionTransformer") else {}


def _check_amount(folder: Path, config: FlexAttnLlavaConfig, variant: str | None) -> None:
    """Raise CheckpointError if the files are far too small for the language model that the configuration describes.

    A damaged config.json may describe a model of many gigabytes, whose missing weights would be made before they are
    reported. Quantised weights take half a byte each; half of that is required.
    """
    text = config.text_config
    of_layer = 3 * text.hidden_size * getattr(text, "intermediate_size", 0)
    described = text.num_hidden_layers * of_layer + text.vocab_size * text.hidden_size
    found = sum(file.stat().st_size for file in weight_files(folder, variant) if file.is_file())
    if described > _HARMLESS and described / 4 > found:
        raise CheckpointError(
            f"the weights in {folder} take {found} bytes, too few for the {described} weights and more that its "
            "config.json describes; one of the two is damaged or belongs to another model"
        )


def _read_weights(loader: Callable[..., Any], folder: Path, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Call `loader`; every error that a damaged file may cause becomes a CheckpointError."""
    files = weight_files(folder, kwargs.get("variant"))
    with refusing(f"{folder} cannot be loaded"), _without_missing():
        try:
            return loader(folder, *args, output_loading_info=True, **kwargs)
        except Exception as error:
            if any(path.suffix == ".bin" for path in files) and _is_of_pickle(error):
                raise CheckpointError(
                    f"the weights in {folder} are damaged, or a pickle that holds more than tensors, which is never "
                    "executed; convert them to safetensors where they come from"
                ) from error
            if "ignore_mismatched_sizes" in str(error):
                raise CheckpointError(f"the weights in {folder} have other shapes than its config.json says") from error
            if type(error).__name__ == "SafetensorError":
                raise CheckpointError(f"the weights in {folder} are damaged: {first_line(error)}") from error
            raise


@contextmanager
def _without_missing() -> Iterator[None]:
    """Keep transformers from reporting missing weights as new: `load_weights` fills them in, or refuses them."""

    def kept(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or "MISSING" not in text or "UNEXPECTED" in text

    _TRANSFORMERS.addFilter(kept)
    try:
        yield
    finally:
        _TRANSFORMERS.removeFilter(kept)


def _is_of_pickle(error: Exception) -> bool:
    return (
        type(error).__name__ == "UnpicklingError"
        or "weights_only" in str(error)
        or isinstance(error, (OSError, EOFError))
    )


def _new_projections(
    missing: set[str], folder: Path, config: FlexAttnLlavaConfig, form: str, hub: HubOptions | None
) -> set[str]:
    """Return the missing weights that the checkpoint's own system does not have, and that therefore start anew."""
    named = {name for name in missing if is_projection(name)}
    if not named or form == "llava":
        return named
    own = load_config(folder, hub)
    if own.system != config.system:
        return named
    return {name for name in named if layer_of(name) not in own.hr_layers}


def _load_vision_tower(model: Any, folder: Path) -> None:
    tower, info = _read_weights(CLIPVisionModel.from_pretrained, folder, dtype=model.dtype)
    if info["missing_keys"]:
        raise CheckpointError(f"{folder} lacks {len(info['missing_keys'])} weights of the vision tower")
    with refusing(f"the vision tower {folder} does not fit the model"):
        model.model.vision_tower.load_state_dict(tower.state_dict())
