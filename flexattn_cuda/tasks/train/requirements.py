"""What training needs from this machine, refused in one sentence where it is missing."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from transformers.training_args import OptimizerNames

from flexattn_cuda import devices
from flexattn_cuda.errors import InputError
from flexattn_cuda.tasks.options import TrainOptions

_OPTIMIZERS = {"adamw": "adamw_torch"}  # our names that differ from transformers'


@dataclass(frozen=True)
class Machine:
    """Where a run trains, and in which arithmetic.

    Attributes:
        on_cpu: Whether it trains on the CPU.
        precision: "float32", "float64", or "float16" or "bfloat16" for mixed precision.
    """

    on_cpu: bool
    precision: str

    @property
    def weights(self) -> torch.dtype:
        """The dtype of the weights: mixed precision keeps float32."""
        return torch.float64 if self.precision == "float64" else torch.float32


def require_accelerate() -> None:
    """Raise InputError if accelerate is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("training needs the package accelerate: pip install 'flexattn_cuda[train]'")


def require_tensorboard() -> None:
    """Raise InputError if no package that writes TensorBoard logs is installed."""
    if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise InputError("TensorBoard logs need the package tensorboard: pip install tensorboard")


def choose_machine(options: TrainOptions) -> Machine:
    """Return where to train; raise InputError if the device or the precision cannot be used."""
    device = devices.choose_device(options.device)
    if device.index is not None:
        raise InputError(
            f"the device is {options.device!r}; allowed: auto, cpu, cuda; choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    on_cpu = device.type == "cpu"
    return Machine(on_cpu, _choose_precision(options.precision, on_cpu))


def _choose_precision(precision: str, on_cpu: bool) -> str:
    has_bfloat16 = on_cpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "float32" if on_cpu else "bfloat16" if has_bfloat16 else "float16"
    if precision == "float16" and on_cpu:
        raise InputError("mixed precision in float16 needs a GPU; use float32 or bfloat16 on the CPU")
    if precision == "bfloat16" and not has_bfloat16:
        raise InputError("this GPU has no bfloat16, like the V100; use float16")
    return precision


def transformers_optimizer(name: str) -> str:
    """Return transformers' name of an optimizer; raise InputError if there is none."""
    known = [one.value for one in OptimizerNames]
    chosen = _OPTIMIZERS.get(name, name)
    if chosen not in known:
        raise InputError(f"optimizer is {name!r}; allowed: {', '.join([*_OPTIMIZERS, *known])}")
    return chosen
