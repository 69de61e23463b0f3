"""What GPUs are taken to do where time and memory are predicted: the one place for their figures and shares of them.

A prediction counts what has to be done and divides it by a share of what the data sheet promises. Nothing of it was
measured on these GPUs; the shares are what the paper's own times imply (docs/costs.md).
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
SHARE_OF_PEAK = 0.35
"""Of the tensor cores' dense peak, in prompts and in training: 283 prompts of 24.9, 27.1 and 17.1 TFLOPs in 154, 178
and 112 s (table 5, MagnifierBench) are 37, 34 and 35 % of a V100's."""
SHARE_OF_BANDWIDTH = 0.5
"""Of the memory's bandwidth, while an answer is generated: what is left of table 5's times for TextVQA."""
USABLE_MEMORY = 0.9
"""Share of the memory that tensors can fill; the rest goes to the CUDA context and the allocator."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, by its data sheet.

    Attributes:
        name: Its name.
        memory: In bytes.
        peak: FLOPs per second of the tensor cores on dense half precision.
        bandwidth: Of the memory, in bytes per second.
    """

    name: str
    memory: int
    peak: float
    bandwidth: float

    def compute_seconds(self, flops: float) -> float:
        """Return the predicted seconds of matrix products in half precision."""
        return flops / (SHARE_OF_PEAK * self.peak)

    def read_seconds(self, size: float) -> float:
        """Return the predicted seconds of reading so many bytes."""
        return size / (SHARE_OF_BANDWIDTH * self.bandwidth)

    def has_room(self, size: float) -> bool:
        """Return whether tensors of so many bytes fit."""
        return size <= USABLE_MEMORY * self.memory


V100_16 = Gpu("V100 16 GB", 16 * GIB, 125e12, 900e9)
V100 = Gpu("V100 32 GB", 32 * GIB, 125e12, 900e9)  # section 5.6
H100 = Gpu("H100 80 GB", 80 * GIB, 989e12, 3350e9)  # SXM
PREDICTED = (V100, H100)
