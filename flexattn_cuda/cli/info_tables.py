"""What `flexattn info` prints."""

from __future__ import annotations

import platform

import torch
import transformers
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

import flexattn_cuda
from flexattn_cuda import build
from flexattn_cuda.analysis import memory
from flexattn_cuda.analysis.gpus import GIB, V100_16
from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.tasks.load import AttachableInfo, CheckpointInfo


def facts_table() -> Table:
    """Return versions, facts about the build, and the paths that this machine can use."""
    built = build.build_info()
    toolkit = built["cuda_toolkit"]
    gpus = [_gpu(number) for number in range(torch.cuda.device_count())]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("flexattn_cuda", flexattn_cuda.__version__)
    table.add_row("Python", platform.python_version())
    table.add_row("torch", torch.__version__)
    table.add_row("transformers", transformers.__version__)
    table.add_row("built with", f"compiler {built['compiler']}, torch {built['torch']}")
    table.add_row("CUDA kernels", f"CUDA {toolkit}" if toolkit else f"none: {built['no_cuda_reason']}")
    table.add_row("compiled for", ", ".join(built["architectures"]) or "the CPU only")
    table.add_row("GPUs seen", "; ".join(gpus) or "none")
    table.add_row("CPU path", "available")
    table.add_row("CUDA path", build.cuda_unavailable_reason() or "available")
    return table


def _gpu(number: int) -> str:
    properties = torch.cuda.get_device_properties(number)
    memory_size = properties.total_memory / GIB
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory_size:.1f} GiB"


def model_report(checkpoint: CheckpointInfo | AttachableInfo) -> list[RenderableType]:
    """Return what a model is, and the memory that it needs.

    Raises:
        CheckpointError: If the configuration cannot be built.
    """
    return memory_report(checkpoint) if isinstance(checkpoint, CheckpointInfo) else [_attachable_table(checkpoint)]


def _attachable_table(found: AttachableInfo) -> Table:
    """Return what FlexAttention attaches to."""
    settings, side = found.settings, found.lr_side
    lr = "of the image's aspect ratio" if side is None else f"{side} x {side}"
    hr = f"{settings.zoom} times the rows and columns"
    hr = hr if side is None else f"{side * settings.zoom} x {side * settings.zoom}"
    table = Table(box=None, show_header=False, pad_edge=False, title=f"[bold]{escape(str(found.folder))}[/bold]")
    table.title_justify = "left"
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("family", found.family)
    table.add_row("model", escape(found.base))
    table.add_row("adapter", "yes" if found.adapter else "none: HR projections start as copies; train them")
    table.add_row("LR tokens", lr)
    table.add_row("HR tokens", hr)
    table.add_row("layers with HR", f"{found.layers[0]} to {found.layers[-1]}")
    table.add_row("settings", ", ".join(f"{name}={value}" for name, value in settings.to_dict().items()))
    weights = [f"{_size(found.parameters * width)} in {name}" for name, width in (("float16", 2), ("float32", 4))]
    table.add_row("weights", ", ".join(weights))
    return table


def memory_report(checkpoint: CheckpointInfo) -> list[RenderableType]:
    """Return the memory that a model and one image need, and whether the smaller V100 has it.

    Raises:
        CheckpointError: If the configuration cannot be built.
    """
    config = checkpoint.config
    try:
        estimates = [memory.estimate(config, dtype) for dtype in (torch.float16, torch.float32)]
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error
    report: list[RenderableType] = [
        f"[bold]Memory[/bold] of {escape(str(checkpoint.folder))}, {checkpoint.format} format"
    ]
    if config.hr_layers:
        report.append(_about_tokens(config))
    report.append(_memory_table(config, estimates))
    for name, estimate in zip(("float16 or bfloat16", "float32"), estimates):
        report.append(f"16 GiB (the smaller V100) in {name}: {_verdict(estimate)}")
    return report


def _about_tokens(config: FlexAttnLlavaConfig) -> str:
    side = config.flexattn.highres_size
    return (
        f"An image gives {config.lr_side} x {config.lr_side} low-resolution tokens and, from {side} x {side} pixels, "
        f"{config.hr_side} x {config.hr_side} high-resolution (HR) tokens, which layers {config.hr_layers[0]} to "
        f"{config.hr_layers[-1]} attend to."
    )


def _memory_table(config: FlexAttnLlavaConfig, estimates: list[memory.MemoryEstimate]) -> Table:
    """Return a table with a column per estimate."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("float16, bfloat16", justify="right")
    table.add_column("float32", justify="right")

    def row(name: str, *sizes: int, style: str | None = None) -> None:
        table.add_row(name, *map(_size, sizes), style=style)

    for part in estimates[0].weights:
        row(f"weights: {part}", *(one.weights[part] for one in estimates))
    row("all weights", *(one.all_weights for one in estimates), style="bold")
    positions, share = estimates[0].positions, f"{estimates[0].selected_share:.0%}"
    row(f"per image: sequence cache, {positions} positions", *(one.sequence_cache for one in estimates))
    if not config.hr_layers:
        row("weights and one image", *(one.total for one in estimates), style="bold")
        return table
    row("per image: HR features", *(one.hr_features for one in estimates))
    row(f"per image: HR cache, {share} of the HR tokens", *(one.hr_cache_selected for one in estimates))
    row("per image: HR cache, all HR tokens", *(one.hr_cache_all for one in estimates))
    row(f"weights and one image, {share} of the HR tokens", *(one.total for one in estimates), style="bold")
    row("weights and one image, all HR tokens", *(one.total_all for one in estimates), style="bold")
    return table


def _verdict(estimate: memory.MemoryEstimate) -> str:
    left = V100_16.memory - estimate.total
    if left < 0:
        return f"not enough, {_size(-left)} short"
    rest = f"{_size(left)} left for activations and the CUDA context"
    return f"barely enough, {rest}" if left < GIB else f"enough, {rest}"


def _size(amount: int) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if amount >= unit:
            return f"{amount / unit:.2f} {name}"
    return f"{amount / 1024:.0f} KiB"
