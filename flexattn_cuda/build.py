"""What this build can do on this machine, and why not more."""

from __future__ import annotations

import torch

from flexattn_cuda.native import compiled


def build_info() -> dict[str, str | tuple[str, ...] | None]:
    """Facts compiled into the native part.

    version: Of this package. torch: The one that it was built against. compiler: The host compiler.
    cuda_toolkit: Version, or None for a build without CUDA kernels. architectures: e.g. ("7.0", "8.0+PTX").
    no_cuda_reason: Why there are no CUDA kernels, or None.
    """
    facts = {name: value or None for name, value in compiled.build_info().items()}
    return facts | {"architectures": tuple((facts["architectures"] or "").split())}


def cuda_unavailable_reason(device_index: int | None = None) -> str | None:
    """Why the CUDA kernels cannot run on a GPU (by default the current one); None where they can."""
    info = build_info()
    if info["no_cuda_reason"]:
        return f"this build has no CUDA kernels: {info['no_cuda_reason']}"
    if not torch.cuda.is_available():
        return f"torch sees no GPU on this machine{_why_torch_sees_none()}"
    if device_index is not None and not 0 <= device_index < torch.cuda.device_count():
        return f"there is no GPU {device_index}; this machine has {torch.cuda.device_count()}"
    major, minor = torch.cuda.get_device_capability(device_index)
    return architecture_reason((major, minor), info["architectures"])


def architecture_reason(capability: tuple[int, int], architectures: tuple[str, ...]) -> str | None:
    """Why no compiled code fits a GPU of this compute capability; None where some does.

    Machine code runs on its own generation from its minor version on (9.0a: on exactly that), PTX on all that are not older.
    The operators say the same before they launch anything.
    """
    return compiled.architecture_reason(*capability, " ".join(architectures)) or None


def _why_torch_sees_none() -> str:
    """ ": " and what torch says, e.g. that the driver is too old; empty where it says nothing."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f": {str(error).strip().splitlines()[0]}"
    return ""
