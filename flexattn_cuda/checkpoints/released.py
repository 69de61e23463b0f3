"""The released FlexAttention format: names of weights, configuration, and a vision tower that may lie elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from flexattn_cuda.checkpoints.files import is_inside, refuse_foreign_files
from flexattn_cuda.checkpoints.locate import HubOptions, Part, is_hub_id, resolve_folder
from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.mechanism.config import FlexAttnConfig

# Names of the released format on the left, of transformers' LLaVA on the right. What follows the tower's own name is
# CLIP's, which transformers brings to its current form itself.
KEY_MAPPING = {
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.vision_tower\.vision_tower\.": "model.vision_tower.",
    r"^model\.embed_tokens\.": "model.language_model.embed_tokens.",
    r"^model\.layers\.": "model.language_model.layers.",
    r"^model\.norm\.": "model.language_model.norm.",
}
_LLAMA_FIELDS = (
    "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "head_dim", "pad_token_id", "rms_norm_eps", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "use_cache", "vocab_size",
)  # fmt: skip
_ONLY = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"}


def config_from_released(folder: Path, values: dict[str, Any], hub: HubOptions) -> FlexAttnLlavaConfig:
    """Return the configuration of a checkpoint in the released format; `values` is its config.json.

    Raises:
        ValueError: If a field is wrong, or has a value that is not known of this format.
        CheckpointError: If the vision tower cannot be found.
    """
    for name, value in _ONLY.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} is {values[name]!r}; of the released format only {value!r} is known")
    text = {name: values[name] for name in _LLAMA_FIELDS if values.get(name) is not None}
    text_config = LlamaConfig(**text)
    tower = vision_tower_folder(folder, values, hub, Part.CONFIG)
    config = FlexAttnLlavaConfig(
        text_config=text_config.to_dict(),
        vision_config=CLIPVisionConfig.from_pretrained(tower).to_dict(),
        # The released code marks an image with -200; here it is the first id after the vocabulary, never embedded.
        image_token_index=text_config.vocab_size,
        vision_feature_layer=values.get("mm_vision_select_layer", -2),
        projector_hidden_act="gelu",
        flexattn_config=FlexAttnConfig.from_extra(values.get("extra", {})).to_dict(),
        dtype=values.get("torch_dtype") or values.get("dtype") or "float32",
    )
    config.image_seq_length = config.lr_side**2
    return config


def vision_tower_folder(
    folder: Path, values: dict[str, Any], hub: HubOptions | None = None, parts: Part = Part.ALL
) -> Path:
    """Return the folder of the vision tower that `mm_vision_tower` in config.json (`values`) names.

    It is looked for under its name inside the checkpoint, then beside it, then on the hub. A path that leads anywhere
    else, which a checkpoint may bring along from the machine that it was trained on, is not followed.

    Raises:
        CheckpointError: If config.json names no tower, or the tower is in none of these.
    """
    tower = values.get("mm_vision_tower")
    if not isinstance(tower, str) or not tower.strip():
        raise CheckpointError(f"{folder / 'config.json'} names no mm_vision_tower")
    last = Path(tower).name
    within = [folder / name for name in (tower, last) if is_inside(folder / name, folder)]
    stays = not Path(tower).is_absolute() and ".." not in Path(tower).parts
    beside = [folder.parent / name for name in (tower if stays else last, last) if name]
    for candidate in within + beside:
        if candidate.is_dir() and candidate.resolve() != folder.resolve():
            refuse_foreign_files(candidate)
            return candidate
    if is_hub_id(tower):
        try:
            return resolve_folder(tower, (hub or HubOptions()).elsewhere(), parts)
        except CheckpointError:
            pass  # the error below names both ways out
    raise CheckpointError(
        f"the vision tower {tower!r} of {folder} is not on this machine and could not be downloaded: put its folder "
        "inside or beside the checkpoint, or into the local hub cache"
    )
