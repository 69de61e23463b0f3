"""What one forward call is, and what its caller asks of the mechanism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.counts import CountReader, read_counts
from flexattn_cuda.mechanism.grid import ImageGrids
from flexattn_cuda.mechanism.trace import Trace


class Span(NamedTuple):
    """Positions of an image's LR tokens within a call, half-open."""

    start: int
    end: int


@dataclass(frozen=True)
class CallShape:
    """What one forward call is.

    Attributes:
        batch: B, rows.
        queries: N, positions of this call.
        past: Positions before it; 0 in compiled code, which cannot ask.
        decoding: Whether the prompt lies behind; from there on, an image token is one that the model wrote.
        compiled: Whether this is a decoding step in compiled code.
    """

    batch: int
    queries: int
    past: int
    decoding: bool
    compiled: bool

    @classmethod
    def of(
        cls,
        sequence: torch.Tensor,
        cache: Cache | None,
        prompt_length: int | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> CallShape:
        """Describe a call.

        Args:
            sequence: [B, N] token ids or [B, N, D] embeddings.
            cache: The key/value cache, if any.
            prompt_length: Positions up to the end of the prompt, if the caller said so.
            cache_position: Where the call begins, as older transformers pass it.

        Raises:
            ValueError: If the cache is not transformers' own, or was left incomplete by an earlier call.
        """
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(
                f"the key/value cache is a {type(cache).__name__}; flexattn attention takes transformers' Cache: call "
                "generate with a batch, not generate_batch (continuous batching)"
            )
        batch, queries = sequence.shape[:2]
        # The length of a static cache lies on the device: a compiled decoding step does without it.
        if torch.compiler.is_compiling() and queries == 1 and cache is not None:
            return cls(batch, queries, past=0, decoding=True, compiled=True)
        past = _length(cache, cache_position)
        _check_cache(cache)
        decoding = past > 0 and (queries == 1 if prompt_length is None else past >= prompt_length)
        return cls(batch, queries, past, decoding, compiled=False)

    @property
    def phase(self) -> str:
        """Name of the profiler range around the call."""
        return "decode" if self.decoding and self.queries == 1 else "prefill"


@dataclass(frozen=True)
class NewImages:
    """The n images that come with a call, in the order of the prompts.

    Attributes:
        spans: Of each prompt, where its images' LR tokens stand in the call.
        grids: Of the images, n.
        pixels: n images [3, height, width] at high resolution, whose tiles are encoded when a selection reaches them;
            or
        features: n times [tokens, D], their HR tokens.
        valid_rect: [n, 4] int, the images inside their padding in LR cells; the whole grid if None.
        rows_per_prompt: Rows of the batch that follow each other and share a prompt's images.
    """

    spans: list[list[Span]]
    grids: Sequence[ImageGrids]
    pixels: Sequence[torch.Tensor] | torch.Tensor | None = None
    features: Sequence[torch.Tensor] | torch.Tensor | None = None
    valid_rect: torch.Tensor | None = None
    rows_per_prompt: int = 1

    def placed(self) -> Iterator[tuple[int, int, Span]]:
        """Return the number of the prompt, that of the image in it, and its positions, for every image."""
        for prompt, spans in enumerate(self.spans):
            for image, span in enumerate(spans):
                yield prompt, image, span


@dataclass(frozen=True)
class HRRequest:
    """What the caller of a forward call asks of the mechanism.

    Attributes:
        shape: What the call is; found out from the text model's arguments if None.
        images: The images that come with it.
        labels: [B, N] of training and scoring: the rows that predict an answer token see HR tokens.
        prompt_length: Positions up to the end of the prompt, if it is not the end of this call.
        alpha: Weight of the attention with HR tokens.
        trace: Records maps and selections.
        cached: Keep projected keys and values beside the cache.
        on_demand: Encode a tile when a selection first reaches it; if False, encode all now.
        capacity: Slots of every layer's pool, for pools that never grow.
        read_counts: Where the host learns how much was selected.
    """

    shape: CallShape | None = None
    images: NewImages | None = None
    labels: torch.Tensor | None = None
    prompt_length: int | None = None
    alpha: float = 1.0
    trace: Trace | None = None
    cached: bool = True
    on_demand: bool = True
    capacity: int | None = None
    read_counts: CountReader = field(default=read_counts)


def can_rewind(cache: Cache | None) -> bool:
    """Return whether the latest positions can be taken out of a key/value cache again."""
    return cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers)


def rewind(cache: Cache, positions: int) -> None:
    """Take the latest positions out of a key/value cache, and leave what is beside it."""
    for layer in cache.layers:
        layer.crop(-positions)


def _length(cache: Cache | None, cache_position: torch.Tensor | None) -> int:
    """Return the positions in the cache. In transformers 5.0 a static cache counts keys of zeros as not written."""
    if cache is None:
        return 0
    return int(cache.get_seq_length() if cache_position is None else cache_position[0])


def _check_cache(cache: Cache | None) -> None:
    images = HRCache.beside(cache)
    if images is not None and images.unfinished:
        raise ValueError(
            "an earlier call with this key/value cache ended in an error and left some layers without its keys; "
            "start again with a new cache"
        )


def check_keeps_all(cache: Cache | None, length: int) -> None:
    """Raise unless a key/value cache still holds every position of a sequence of `length`: images are read from it.

    Raises:
        ValueError: If it keeps the latest positions alone.
    """
    for layer in getattr(cache, "layers", ()):
        window = _window(layer) if getattr(layer, "is_sliding", False) else None
        if window is not None and length > window:
            raise ValueError(
                f"the key/value cache keeps a window of {window} positions, but this call ends at position {length}, "
                "and with high-resolution images flexattn attention needs all of them; pass DynamicCache() without a "
                "config, and no cache_implementation"
            )


def _window(layer: Any) -> int | None:
    """Return how many positions a layer of a cache keeps; one of fixed size knows no window, only its length."""
    window: int | None = getattr(layer, "sliding_window", None)
    return getattr(layer, "max_cache_len", None) if window is None else window
