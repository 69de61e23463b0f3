"""FlexAttention for high-resolution vision-language models (Li et al., ECCV 2024): CUDA and CPU operators, and LLaVA on them.

Not `torch.nn.attention.flex_attention`, which is a compiler for attention variants.
"""

from flexattn_cuda import ops
from flexattn_cuda.answering import Answer, ask, load
from flexattn_cuda.batch import answer_file
from flexattn_cuda.configuration import FlexAttnConfig, FlexAttnLlavaConfig
from flexattn_cuda.modeling import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.processing import FlexAttnLlavaProcessor
from flexattn_cuda.trace import LayerTrace, Trace

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "FlexAttnConfig",
    "FlexAttnLlavaConfig",
    "FlexAttnLlavaForConditionalGeneration",
    "FlexAttnLlavaProcessor",
    "LayerTrace",
    "Trace",
    "answer_file",
    "ask",
    "load",
    "ops",
]
