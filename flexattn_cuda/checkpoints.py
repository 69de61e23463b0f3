"""Three checkpoint formats and one model: our own, transformers' LLaVA format, and the released one.

    format      config.json                    HR projections        vision tower
    flexattn    model_type flexattn_llava      in the checkpoint     in the checkpoint
    llava       model_type llava               absent: see hr_init   in the checkpoint
    released    model_type llava_llama         in the checkpoint     in the checkpoint, or only named by mm_vision_tower

A checkpoint may be loaded as another system than its own (`FlexAttnConfig.system`); what that system has beyond it starts as
`hr_init` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    conversion_mapping,
)
from transformers.models.clip import modeling_clip

from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.mechanism.config import FlexAttnConfig

_FORMATS = {"flexattn_llava": "flexattn", "llava": "llava", "llava_llama": "released"}

# Names of the released format on the left, of transformers' LLaVA on the right. What follows the tower's own name is
# CLIP's, which transformers brings to its current form itself.
_RELEASED_KEYS = {
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.vision_tower\.vision_tower\.": "model.vision_tower.",
    r"^model\.embed_tokens\.": "model.language_model.embed_tokens.",
    r"^model\.layers\.": "model.language_model.layers.",
    r"^model\.norm\.": "model.language_model.norm.",
}
# transformers 5.0 nests CLIP in a `vision_model` and reads only names that do; a checkpoint saved by a later one has none.
_NESTED_TOWER_KEYS = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model.language_model",
    r"^vision_tower\.(?!vision_model\.)": "model.vision_tower.vision_model.",
    r"^vision_tower\.vision_model": "model.vision_tower.vision_model",
    r"^multi_modal_projector": "model.multi_modal_projector",
}
_RELEASED_LLAMA_FIELDS = (
    "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "head_dim", "pad_token_id", "rms_norm_eps", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "use_cache", "vocab_size",
)  # fmt: skip


def resolve_folder(name_or_path: str | Path, beside: Path | None = None) -> Path:
    """The local folder of a checkpoint.

    Args:
        name_or_path: A folder; or a hub id ("owner/name"), which is looked for beside `beside`, then in the local hub
            cache, and downloaded only if it is in neither and the hub can be reached.
        beside: A checkpoint folder next to or inside which the folder may lie under its own or its last name.
    Raises:
        CheckpointError: There is no such folder.
    """
    name, last = str(name_or_path), Path(name_or_path).name
    candidates = [Path(name)]
    if beside is not None:
        candidates = [
            beside / name,
            beside / last,
            beside.parent / name,
            beside.parent / last,
        ] + candidates
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    if Path(name).is_file():
        raise CheckpointError(f"{name!r} is a file; a checkpoint is the folder that holds config.json")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        for local_only in (True, False):
            try:
                return Path(snapshot_download(name, local_files_only=local_only))
            except Exception:  # not in the cache; then: offline, unknown or gated, all told below
                continue
    raise CheckpointError(
        f"no checkpoint {name!r}: neither a local folder nor a model in the local hub cache, and it could not be downloaded"
    )


def checkpoint_format(folder: str | Path) -> str:
    """ "flexattn", "llava" or "released"; CheckpointError for anything else."""
    model_type = _read_config(Path(folder)).get("model_type")
    if model_type not in _FORMATS:
        raise CheckpointError(
            f"{folder} holds a model of type {model_type!r}; this package loads {', '.join(sorted(_FORMATS))}"
        )
    return _FORMATS[model_type]


def load_config(folder: str | Path) -> FlexAttnLlavaConfig:
    """The configuration of a checkpoint in any of the three formats."""
    folder, form = Path(folder), checkpoint_format(folder)
    try:
        if form == "flexattn":
            config = FlexAttnLlavaConfig.from_pretrained(folder)
            config.flexattn  # fails here, in one sentence, where a field is wrong
            return config
        return _from_llava(folder) if form == "llava" else _from_released(folder)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def vision_tower_folder(folder: str | Path, config: dict[str, Any] | None = None) -> Path:
    """The local folder of the vision tower that a checkpoint in the released format names in `mm_vision_tower`."""
    folder = Path(folder)
    tower = (config or _read_config(folder)).get("mm_vision_tower")
    if not tower:
        raise CheckpointError(f"{folder / 'config.json'} names no mm_vision_tower")
    try:
        return resolve_folder(tower, beside=folder)
    except CheckpointError:
        raise CheckpointError(
            f"the vision tower {tower!r} of {folder} is not on this machine: put its folder beside or inside the "
            "checkpoint, or into the local hub cache"
        ) from None


def load_weights(
    loader: Callable[..., Any], folder: Path, config: FlexAttnLlavaConfig, *args: Any, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Calls transformers' `from_pretrained` (`loader`) with this format's names and fills in what the format lacks."""
    form = checkpoint_format(folder)
    if form == "released":
        kwargs["key_mapping"] = _RELEASED_KEYS | (kwargs.get("key_mapping") or {})
    elif form == "flexattn" and hasattr(modeling_clip, "CLIPVisionTransformer"):
        kwargs["key_mapping"] = _NESTED_TOWER_KEYS | (kwargs.get("key_mapping") or {})
    try:
        model, info = loader(folder, *args, config=config, output_loading_info=True, **kwargs)
    except OSError as error:
        raise CheckpointError(f"{folder} has no readable weights: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise CheckpointError(f"the weights in {folder} are damaged: {_first_line(error)}") from error
        raise
    # transformers would save with the names it loaded from; this model is saved in its own format only.
    model._weight_conversions = None

    missing = set(info["missing_keys"])
    projections = {name for name in missing if _is_projection(name) and _is_new(name, config, folder, form)}
    tower = {key for key in missing if key.startswith("model.vision_tower.")}
    if form == "released" and tower:
        _load_vision_tower(model, vision_tower_folder(folder))
        missing -= tower
    _start_projections(model, projections, config)
    missing -= projections
    if missing:
        named = sorted(missing)
        raise CheckpointError(f"{folder} lacks {len(named)} weights of the model, the first is {named[0]}")
    info["missing_keys"] = type(info["missing_keys"])(missing)
    return model, info


def register_key_conversion(model_class: type) -> None:
    """Lets a class outside transformers convert checkpoint names as LLaVA does (transformers does so by itself up to 5.16)."""
    mapping = conversion_mapping.get_checkpoint_conversion_mapping("llava")
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no object")
    return values


def _from_llava(folder: Path) -> FlexAttnLlavaConfig:
    values = LlavaConfig.from_pretrained(folder).to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    size = values["vision_config"]["image_size"]
    flexattn = FlexAttnConfig.released(lowres_size=size, highres_size=3 * size)
    return FlexAttnLlavaConfig(**values, flexattn_config=flexattn.to_dict())


def _from_released(folder: Path) -> FlexAttnLlavaConfig:
    values = _read_config(folder)
    expected = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} is {values[name]!r}; of the released format only {value!r} is known")
    text = {name: values[name] for name in _RELEASED_LLAMA_FIELDS if values.get(name) is not None}
    text_config = LlamaConfig(**text)
    config = FlexAttnLlavaConfig(
        text_config=text_config.to_dict(),
        vision_config=CLIPVisionConfig.from_pretrained(vision_tower_folder(folder, values)).to_dict(),
        # The released code marks an image with -200; here it is the first id after the vocabulary, never embedded.
        image_token_index=text_config.vocab_size,
        vision_feature_layer=values.get("mm_vision_select_layer", -2),
        projector_hidden_act="gelu",
        flexattn_config=FlexAttnConfig.from_extra(values.get("extra", {})).to_dict(),
        dtype=values.get("torch_dtype") or values.get("dtype") or "float32",
    )
    config.image_seq_length = config.lr_side**2
    return config


def _load_vision_tower(model: Any, folder: Path) -> None:
    tower = CLIPVisionModel.from_pretrained(folder, dtype=model.dtype)
    model.model.vision_tower.load_state_dict(tower.state_dict())


def _is_projection(name: str) -> bool:
    return "_proj_hd." in name or ".cross_attn." in name


def _is_new(name: str, config: FlexAttnLlavaConfig, folder: Path, form: str) -> bool:
    """Whether the checkpoint's own system has no such weight."""
    own = None if form == "llava" else load_config(folder)
    layer = int(name.split(".layers.")[1].split(".")[0])
    return own is None or own.system != config.system or layer not in own.hr_layers


@torch.no_grad()
def _start_projections(model: Any, names: set[str], config: FlexAttnLlavaConfig) -> None:
    """FlexAttention's projections are copies of self-attention's, those of LLaVA-XAttn too, with zeros for its output."""
    weights = dict(model.named_parameters())
    for name in names:
        if name.endswith("cross_attn.o_proj.weight"):
            weights[name].zero_()
        elif config.flexattn.hr_init == "copy":
            source = name.replace("_proj_hd.", "_proj.").replace("cross_attn.norm.", "input_layernorm.")
            source = source.replace("cross_attn.", "self_attn.")
            weights[name].copy_(
                _with_heads(
                    weights[source],
                    len(weights[name]),
                    model.config.text_config.num_key_value_heads,
                )
            )


def _with_heads(weight: torch.Tensor, rows: int, kv_heads: int) -> torch.Tensor:
    """Keys or values that several heads share (GQA) are repeated where every head has its own."""
    if len(weight) == rows:
        return weight
    return weight.unflatten(0, (kv_heads, -1)).repeat_interleave(rows // len(weight), 0).flatten(0, 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
