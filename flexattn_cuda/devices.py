"""Devices and dtypes by name."""

from __future__ import annotations

import torch

from flexattn_cuda import build
from flexattn_cuda.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the named device; None and "auto" stand for the GPU if it can be used, else for the CPU.

    Raises:
        InputError: If the device is unknown, or cannot be used here; the message says why.
    """
    if device is None or device == "auto":
        return torch.device("cpu" if build.cuda_unavailable_reason() else "cuda")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise InputError(f"the device is {str(device)!r}; allowed: auto, cpu, cuda, cuda:N")
    if chosen.type == "cuda" and (reason := build.cuda_unavailable_reason(chosen.index)):
        raise InputError(f"the device {str(device)!r} cannot be used: {reason}")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the named dtype; for None and "auto" return None, which stands for the checkpoint's own dtype.

    Raises:
        InputError: If the dtype is unknown.
    """
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"the dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
