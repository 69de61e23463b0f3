"""The families of models that FlexAttention can be attached to, by transformers' `model_type`."""

from __future__ import annotations

from transformers import PreTrainedModel

from flexattn_cuda.families.family import Family
from flexattn_cuda.families.qwen2_vl import Qwen2VL
from flexattn_cuda.families.towers import BaseView, Gemma3, Idefics3, InternVL, LlavaTower, PaliGemma

FAMILIES: dict[str, type[Family]] = {
    "gemma3": Gemma3,
    "idefics3": Idefics3,
    "internvl": InternVL,
    "llava": LlavaTower,
    "llava_next": BaseView,
    "llava_onevision": BaseView,
    "paligemma": PaliGemma,
    "qwen2_5_vl": Qwen2VL,
    "qwen2_vl": Qwen2VL,
    "smolvlm": Idefics3,
    "vipllava": LlavaTower,
}


def family_of(model: PreTrainedModel) -> type[Family]:
    """Return the family of a model.

    Raises:
        ValueError: If it is not known.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"flexattn does not know models of type {kind!r}; it knows {', '.join(FAMILIES)}: describe yours in a "
            "subclass of flexattn_cuda.families.family.Family and pass it as family="
        )
    return FAMILIES[kind]
