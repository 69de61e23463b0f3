"""The configuration of a checkpoint in any of the three formats, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlavaConfig, PreTrainedConfig

from flexattn_cuda.checkpoints.files import read_json, refusing
from flexattn_cuda.checkpoints.locate import HubOptions
from flexattn_cuda.checkpoints.released import config_from_released
from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.mechanism.config import FlexAttnConfig

FORMATS = {"flexattn_llava": "flexattn", "llava": "llava", "llava_llama": "released"}

# Sizes that must be whole numbers from 1 up to a limit. The limits lie far beyond any model, and keep a damaged file
# from filling the memory with modules.
_MAX_SIZE = 1 << 24
_MAX_PIXELS = 1 << 14  # of a side
_MAX_SIZES = {
    "head_dim": _MAX_SIZE,
    "hidden_size": _MAX_SIZE,
    "image_size": _MAX_PIXELS,
    "intermediate_size": _MAX_SIZE,
    "max_position_embeddings": 1 << 31,
    "num_attention_heads": 1 << 16,
    "num_channels": 3,
    "num_hidden_layers": 1 << 12,
    "num_key_value_heads": 1 << 16,
    "patch_size": _MAX_PIXELS,
    "vocab_size": _MAX_SIZE,
}
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def checkpoint_format(folder: str | Path) -> str:
    """Return the format of a checkpoint folder: "flexattn", "llava" or "released".

    Raises:
        CheckpointError: If the folder has no readable config.json, or holds another kind of model.
    """
    model_type = read_config(Path(folder)).get("model_type")
    if not isinstance(model_type, str) or model_type not in FORMATS:
        raise CheckpointError(
            f"{folder} holds a model of type {model_type!r}; this package loads {', '.join(sorted(FORMATS))}"
        )
    return FORMATS[model_type]


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json as it is.

    Raises:
        CheckpointError: If the file is missing, or is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    return read_json(path)


def load_config(folder: str | Path, hub: HubOptions | None = None) -> FlexAttnLlavaConfig:
    """Return the configuration of a checkpoint folder in any of the three formats.

    Args:
        folder: A local folder, as `resolve_folder` returns it.
        hub: Where the released format names a vision tower on the hub: options for fetching its configuration.

    Raises:
        CheckpointError: If the configuration is missing, damaged, of another kind of model, or has an impossible value.
    """
    folder, form = Path(folder), checkpoint_format(folder)
    with refusing(str(folder / "config.json")):
        if form == "flexattn":
            config = FlexAttnLlavaConfig.from_pretrained(folder)
        elif form == "llava":
            config = _from_llava(folder)
        else:
            config = config_from_released(folder, read_config(folder), hub or HubOptions())
        _check_fields(config)
        if form == "llava":
            config.set_settings(FlexAttnConfig.released())
    return config


def _from_llava(folder: Path) -> FlexAttnLlavaConfig:
    values = LlavaConfig.from_pretrained(folder).to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    return FlexAttnLlavaConfig(**values)


def _check_fields(config: FlexAttnLlavaConfig) -> None:
    """Raise ValueError if a field has a value that no model can have."""
    settings = config.flexattn  # its other values are checked as it is made
    if settings is not None and settings.highres_size > _MAX_PIXELS:
        raise ValueError(f"flexattn highres_size is {settings.highres_size}; it may be at most {_MAX_PIXELS}")
    for part in (config.text_config, config.vision_config):
        _check_sizes(part)
    if not is_whole(config.image_token_id, 0, _MAX_SIZE):
        raise ValueError(f"image_token_index is {config.image_token_id!r}; it must be a token id")
    _check_feature_layers(config)
    dtype = getattr(config, "dtype", None)
    if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
        raise ValueError(f"dtype is {str(dtype)!r}; allowed: {', '.join(_DTYPES)}")


def _check_sizes(config: PreTrainedConfig) -> None:
    for name, limit in _MAX_SIZES.items():
        size = getattr(config, name, 1)
        derived = size is None and name in ("head_dim", "num_key_value_heads")
        if not derived and not is_whole(size, 1, limit):
            raise ValueError(f"{config.model_type} {name} is {size!r}; it must be a whole number from 1 to {limit}")
    for name in ("layer_norm_eps", "rms_norm_eps"):
        epsilon = getattr(config, name, 1e-5)
        if not isinstance(epsilon, (int, float)) or isinstance(epsilon, bool):
            raise ValueError(f"{config.model_type} {name} is {epsilon!r}; it must be a number")
    heads = config.num_attention_heads
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise ValueError(f"{config.model_type} hidden_size {config.hidden_size} cannot be split into {heads} heads")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(f"{config.model_type} has {heads} heads, which {kv_heads} key/value heads cannot share evenly")


def _check_feature_layers(config: FlexAttnLlavaConfig) -> None:
    check_vision_feature_layer(config)
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; only 'default' is known"
        )


def check_vision_feature_layer(config: Any) -> None:
    """Raise ValueError if the layers of the vision tower that a configuration takes the features from do not exist."""
    layers = config.vision_config.num_hidden_layers
    chosen = config.vision_feature_layer
    for layer in chosen if isinstance(chosen, (list, tuple)) and chosen else [chosen]:
        if not is_whole(layer, -layers, layers) or layer == 0:
            raise ValueError(
                f"vision_feature_layer is {chosen!r}; the vision tower has layers 1 to {layers}, or {-layers} to -1"
            )


def is_whole(value: Any, low: int, high: int) -> bool:
    """Return whether a value read from JSON is an integer from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
