"""What this build can do on this machine, and why it cannot do more."""

from __future__ import annotations

from typing import TypedDict

import torch

from flexattn_cuda.native import compiled


class BuildInfo(TypedDict):
    """Result of `build_info`.

    Attributes:
        version: Version of this package.
        torch: Version of torch that it was built with.
        compiler: The host compiler.
        cuda_toolkit: Version of the CUDA toolkit, or None in a build without CUDA kernels.
        architectures: GPU architectures compiled for, e.g. ("7.0", "8.0+PTX").
        no_cuda_reason: Why there are no CUDA kernels, or None.
    """

    version: str
    torch: str
    compiler: str
    cuda_toolkit: str | None
    architectures: tuple[str, ...]
    no_cuda_reason: str | None


def build_info() -> BuildInfo:
    """Return the facts that the build left in the compiled part."""
    facts: dict[str, str] = compiled.build_info()
    return BuildInfo(
        version=facts["version"],
        torch=facts["torch"],
        compiler=facts["compiler"],
        cuda_toolkit=facts["cuda_toolkit"] or None,
        architectures=tuple(facts["architectures"].split()),
        no_cuda_reason=facts["no_cuda_reason"] or None,
    )


def cuda_unavailable_reason(device_index: int | None = None) -> str | None:
    """Return why the CUDA kernels cannot run on a GPU (by default the current one), or None if they can."""
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
    """Return why no compiled code runs on a GPU of this compute capability, or None if some does.

    Machine code runs on GPUs of its own major version and at least its minor version (9.0a only on 9.0), PTX on
    every GPU that is not older. The operators raise the same sentence before they launch anything.
    """
    return compiled.architecture_reason(*capability, " ".join(architectures)) or None


def _why_torch_sees_none() -> str:
    """Return ": " and what torch says, e.g. that the driver is too old, or an empty string if it says nothing."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f": {str(error).strip().splitlines()[0]}"
    return ""
