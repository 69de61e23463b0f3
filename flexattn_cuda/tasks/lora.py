"""LoRA on this package's LLaVA: small matrices that are trained beside weights that stay as they are.

What `flexattn train --lora` writes is an adapter of PEFT and one of FlexAttention in one folder: the first holds what
was trained, the second the settings and the projections of high-resolution (HR) tokens that it was trained beside.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flexattn_cuda.checkpoints.files import refusing
from flexattn_cuda.errors import InputError

_FILE = "adapter_config.json"  # PEFT's name
# By part to train. The patterns name the language model because the vision tower has layers of the same names.
_TARGETS = {
    "all": r".*language_model\..*\.self_attn\.([qkv]_proj|[kv]_proj_hd)",
    "hr": r".*language_model\..*\.self_attn\.[kv]_proj_hd",
}


def require_peft() -> None:
    """Raise InputError if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("LoRA needs the package peft: pip install 'flexattn_cuda[train]'")


def wrap(model: PreTrainedModel, rank: int, part: str) -> Any:
    """Return PEFT's wrapper of a model, which trains the matrices of LoRA alone.

    Args:
        model: A model with FlexAttention.
        rank: Of the matrices; what they add is scaled by two, as in LLaVA's recipe.
        part: "all" (queries, keys, values and the HR projections) or "hr" (the HR projections).
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_TARGETS[part], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def is_in(folder: Path) -> bool:
    """Return whether a folder holds an adapter of PEFT."""
    return (folder / _FILE).is_file()


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add an adapter of PEFT to the weights of a model, in place.

    Raises:
        CheckpointError: If it cannot be read, or is for another model.
        InputError: If PEFT is not installed.
    """
    require_peft()
    from peft import PeftModel

    with refusing(f"the LoRA adapter in {folder} does not fit the model"):
        merged: PreTrainedModel = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return merged
