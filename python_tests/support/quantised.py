"""Quantise tiny models while they are loaded, as users do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

# transformers 5.0 cannot load any model with the torchao of today: it initialises what is quantised already.
KINDS = ("4bit", "4bit_double", "8bit", *(() if transformers.__version__.startswith("5.0.") else ("torchao",)))
kinds = pytest.mark.parametrize("kind", KINDS)


def config(kind: str, **options: Any) -> Any:
    """Return a quantisation of transformers, which computes in float32."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), **options)
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=kind == "4bit_double",
        **options,
    )


def load(model_class: type[PreTrainedModel], folder: Path, kind: str) -> PreTrainedModel:
    """Load a checkpoint, quantised."""
    return model_class.from_pretrained(folder, dtype=torch.float32, quantization_config=config(kind))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the root mean square of the difference."""
    return (one - other).pow(2).mean().sqrt().item()
