"""The images of a batch of conversations: their high-resolution (HR) tokens and where their LR tokens stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from transformers import Cache

from flexattn_cuda import profiling
from flexattn_cuda.errors import PoolOverflow
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.pool import NEW_AT_ONCE, HRPool

_ATTRIBUTE = "flexattn"
Tile = tuple[int, int, int]  # prompt, image, tile of its zoom x zoom


@dataclass
class HRCache:
    """The images of G prompts, I places for each; a prompt with fewer images is padded with empty ones.

    It is kept as an attribute of the key/value cache, so that a new cache starts without images and two conversations
    never mix. The batch has B rows, B / G for each prompt (beams, samples), which share everything here: a beam may take
    the place of another one of its prompt, rows of different prompts may not change places.

    settings: of the mechanism, as they were when the images came.
    lr_side: S.
    features: [G, I*h*h, D] HR tokens (the projector's output), zero for tiles that have not been encoded yet.
    cos, sin: [G, I*h*h, d] rotary tables of the HR keys.
    ranges: [G, I, 2] int32 first sequence key of each image's LR tokens and one past the last; (0, 0) when absent.
    live: [G, I, 4] int32 the image inside its padding, in LR cells; all 0 when absent.
    prompt_length: positions of the sequence up to the end of the latest prompt; the rows from its last one on see HR.
    waiting: pixels of the tiles that have not been encoded yet, [3, s, s] each.
    pools: by layer, the keys and values that were ever needed there.
    crossed: by layer, the keys and values of LLaVA-XAttn, [G, H, I*h*h, d] each.
    capacity: slots of every pool, if these are fixed.
    last_end: one past the last LR token of any image.
    length: positions of the sequence after the latest call, as far as the host knows.
    projected, encoded: how many tokens were projected, all layers together, and how many tiles encoded.
    """

    settings: FlexAttnConfig
    lr_side: int
    features: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    ranges: torch.Tensor
    live: torch.Tensor
    prompt_length: int = 0
    waiting: dict[Tile, torch.Tensor] = field(default_factory=dict)
    pools: dict[int, HRPool] = field(default_factory=dict)
    crossed: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    capacity: int | None = None
    last_end: int = 0
    length: int = 0
    projected: int = 0
    encoded: int = 0

    @classmethod
    def beside(cls, cache: Cache | None) -> HRCache | None:
        """The images kept beside a cache, if any."""
        return getattr(cache, _ATTRIBUTE, None)

    def keep_beside(self, cache: Cache) -> None:
        setattr(cache, _ATTRIBUTE, self)

    @property
    def zoom(self) -> int:
        return self.settings.zoom

    @property
    def prompts(self) -> int:
        return self.features.shape[0]

    @property
    def tokens(self) -> int:
        """HR tokens of a prompt, I*h*h."""
        return self.features.shape[1]

    def check_overflow(self) -> None:
        """PoolOverflow where a step in a CUDA graph found no room for what it selected. Waits for the device."""
        overflows = [pool.overflow.to(self.features.device) for pool in self.pools.values() if pool.fixed]
        if not overflows:
            return
        without_slot, not_projected = torch.stack(overflows).sum(0).tolist()
        if without_slot:
            raise PoolOverflow(
                f"{without_slot} selected tokens found no room: hr_capacity={self.capacity} is too small"
            )
        if not_projected:
            raise PoolOverflow(
                f"{not_projected} selected tokens too many were new to a layer in one step, which takes {NEW_AT_ONCE} for each row "
                "of the batch; decode without hr_capacity"
            )

    def joined_with(self, later: HRCache) -> HRCache:
        """The images of this conversation followed by those of its next turn."""
        if later.prompts != self.prompts:
            raise ValueError(
                f"the cache holds images of {self.prompts} prompts, but this call brings images of {later.prompts}; "
                "go on with the prompts that the cache was made from"
            )
        device, places = self.features.device, self.ranges.shape[1]
        for pool in self.pools.values():
            pool.add_images(later.tokens)
        return replace(
            later,
            **{
                name: torch.cat([getattr(self, name), getattr(later, name).to(device)], dim=1)
                for name in ("features", "cos", "sin", "ranges", "live")
            },
            waiting=self.waiting | {(g, places + i, t): pixels for (g, i, t), pixels in later.waiting.items()},
            pools=self.pools,
            crossed=self.crossed,
            capacity=self.capacity,
            last_end=max(self.last_end, later.last_end),
            projected=self.projected + later.projected,
            encoded=self.encoded + later.encoded,
        )

    def cropped(self, cache: Cache, length: int) -> HRCache | None:
        """Without the images whose LR tokens are no longer in the cache, which holds `length` positions; None without any."""
        if length == 0:  # it is used again for something else
            delattr(cache, _ATTRIBUTE)
            return None
        if length < self.length:  # what is asked next stands in place of what was cropped
            self.prompt_length = min(self.prompt_length, length + 1)
        if self.last_end <= length:
            return self
        gone = self.ranges[..., 1] > length
        self.ranges = self.ranges.masked_fill(gone[..., None], 0)
        self.live = self.live.masked_fill(gone[..., None], 0)
        self.last_end = int(self.ranges.max())
        return self

    def tile_numbers(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n] int64: which tile each token belongs to, counted over prompts, images and tiles; tokens count over prompts."""
        side = self.hr_side
        image, token = tokens.long() // side**2, tokens.long() % side**2
        row, column = token // side // (side // self.zoom), token % side // (side // self.zoom)
        return (image * self.zoom + row) * self.zoom + column

    @property
    def tile_count(self) -> int:
        return self.prompts * self.ranges.shape[1] * self.zoom**2

    @property
    def hr_side(self) -> int:
        return round((self.tokens / self.ranges.shape[1]) ** 0.5)

    def encode_tiles(self, numbers: Iterable[int], encode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Fills in the features of these tiles, as far as they are waiting. encode: [n, 3, s, s] -> [n, side*side, D]."""
        places, each = self.ranges.shape[1], self.zoom**2
        wanted = [(number // each // places, number // each % places, number % each) for number in numbers]
        wanted = [tile for tile in wanted if tile in self.waiting]
        side = self.hr_side // self.zoom
        if wanted and self.features.is_inference() and not torch.is_inference_mode_enabled():
            self.features = self.features.clone()  # tensors made in inference mode may not be written outside it
        grid = self.features.view(self.prompts, places, self.zoom, side, self.zoom, side, -1)
        for at in range(0, len(wanted), each):  # as many at once as an image has
            some = wanted[at : at + each]
            with profiling.phase("encode_tiles"):
                found = encode(torch.stack([self.waiting.pop(tile) for tile in some]))
            for (g, i, tile), tokens in zip(some, found.to(grid)):
                grid[g, i, tile // self.zoom, :, tile % self.zoom] = tokens.view(side, side, -1)
            self.encoded += len(some)
