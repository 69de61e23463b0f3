"""What this build can do on this machine, and why not more."""

from __future__ import annotations

import torch

from flexattn_cuda import _C

# The numbers of setup.py.
_NO_CUDA = {
    1: "CUDA kernels were switched off when it was built (FLEXATTN_CUDA=0)",
    2: "no CUDA toolkit was found when it was built",
    3: "it was built against a CPU build of torch",
    4: "the CUDA versions of torch and of the toolkit differed when it was built",
}


def build_info() -> dict[str, str | tuple[str, ...] | None]:
    """Facts compiled into the native part.

    version: Of this package. torch: The one that it was built against. compiler: The host compiler.
    cuda_toolkit: Version, or None for a build without CUDA kernels. architectures: e.g. ("7.0", "8.0+PTX").
    no_cuda_reason: Why there are no CUDA kernels, or None.
    """
    facts = _C.build_facts()
    return {
        "version": facts["version"],
        "torch": facts["torch"],
        "compiler": facts["compiler"],
        "cuda_toolkit": facts["cuda_toolkit"] or None,
        "architectures": tuple(part.strip() for part in facts["architectures"].split(",") if part.strip()),
        "no_cuda_reason": _NO_CUDA.get(facts["cuda_state"]),
    }


def cuda_unavailable_reason(device_index: int | None = None) -> str | None:
    """Why the CUDA kernels cannot run on a GPU (by default the current one); None where they can."""
    info = build_info()
    if info["no_cuda_reason"]:
        return f"this build has no CUDA kernels: {info['no_cuda_reason']}"
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine"
    if device_index is not None and not 0 <= device_index < torch.cuda.device_count():
        return f"there is no GPU {device_index}; this machine has {torch.cuda.device_count()}"
    major, minor = torch.cuda.get_device_capability(device_index)
    return architecture_reason((major, minor), info["architectures"])


def architecture_reason(capability: tuple[int, int], architectures: tuple[str, ...]) -> str | None:
    """Whether compiled code fits a GPU: machine code of its generation, up to its minor version, or PTX that is not newer."""
    for entry in architectures:
        major, minor = (int(part) for part in entry.removesuffix("+PTX").rstrip("af").split("."))
        if (major == capability[0] and minor <= capability[1]) or (entry.endswith("+PTX") and (major, minor) <= capability):
            return None
    return (
        f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels were compiled for "
        f"{', '.join(architectures)}; build again with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
    )
