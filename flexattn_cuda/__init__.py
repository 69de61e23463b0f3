"""FlexAttention for high-resolution vision-language models (Li et al., ECCV 2024).

CUDA and CPU operators, the mechanism built on them, and LLaVA with it. This is not `torch.nn.attention.flex_attention`,
which is a compiler for attention variants.

Public names are imported when they are first used (PEP 562), so that `import flexattn_cuda.ops` does not import
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexattn_cuda import ops
    from flexattn_cuda.families.attach import attach, refit, save_adapter, settings_for
    from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
    from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
    from flexattn_cuda.inputs.hr_processor import processor_for
    from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
    from flexattn_cuda.mechanism.config import FlexAttnConfig
    from flexattn_cuda.mechanism.trace import LayerTrace, Trace
    from flexattn_cuda.tasks.ask import Answer, ask
    from flexattn_cuda.tasks.ask_batch import answer_file
    from flexattn_cuda.tasks.load import load
    from flexattn_cuda.tasks.tune import Pointed, Tuning, tune

__version__ = "0.1.0"

_HOMES = {
    "Answer": "tasks.ask",
    "FlexAttnConfig": "mechanism.config",
    "FlexAttnLlavaConfig": "families.llava.config",
    "FlexAttnLlavaForConditionalGeneration": "families.llava.model",
    "FlexAttnLlavaProcessor": "inputs.processor",
    "LayerTrace": "mechanism.trace",
    "Pointed": "tasks.tune",
    "Trace": "mechanism.trace",
    "Tuning": "tasks.tune",
    "answer_file": "tasks.ask_batch",
    "ask": "tasks.ask",
    "attach": "families.attach",
    "load": "tasks.load",
    "processor_for": "inputs.hr_processor",
    "save_adapter": "families.attach",
    "refit": "families.attach",
    "settings_for": "families.attach",
    "tune": "tasks.tune",
}

__all__ = [
    "Answer",
    "FlexAttnConfig",
    "FlexAttnLlavaConfig",
    "FlexAttnLlavaForConditionalGeneration",
    "FlexAttnLlavaProcessor",
    "LayerTrace",
    "Pointed",
    "Trace",
    "Tuning",
    "answer_file",
    "ask",
    "attach",
    "load",
    "ops",
    "processor_for",
    "refit",
    "save_adapter",
    "settings_for",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("flexattn_cuda.ops")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"flexattn_cuda.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
