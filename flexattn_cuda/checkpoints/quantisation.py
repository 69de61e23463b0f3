"""Quantise a checkpoint as it is loaded, without the projections of high-resolution tokens."""

from __future__ import annotations

import copy
from typing import Any

from transformers.quantizers.auto import AutoQuantizationConfig

# Patterns of transformers: they match from the start of a module's name up to a dot or its end.
HR_PROJECTIONS = (r".*[kv]_proj_hd", r".*cross_attn")
_OUTPUTS = "lm_head"  # which transformers leaves out by default
_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # names that quantisers give the list


def without_projections(quantisation: Any) -> Any:
    """Return a quantisation of transformers that leaves the projections of HR tokens as they are.

    Args:
        quantisation: A configuration (`BitsAndBytesConfig`, `TorchAoConfig`, ...), or the dictionary of one.
    """
    quantisation = copy.deepcopy(quantisation)
    if isinstance(quantisation, dict):
        quantisation = AutoQuantizationConfig.from_dict(quantisation)
    for name in _LISTS:
        if hasattr(quantisation, name):
            given = getattr(quantisation, name)
            skipped = [_OUTPUTS] if given is None else list(given)
            setattr(quantisation, name, [*skipped, *(pattern for pattern in HR_PROJECTIONS if pattern not in skipped)])
    return quantisation
