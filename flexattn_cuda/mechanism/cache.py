"""What is kept beside a key/value cache: the images of its conversations and the keys made of their HR tokens.

The key/value cache of transformers becomes the owner of an `HRCache`: what reorders, selects, repeats, crops, resets,
copies or pickles the one does the same to the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from flexattn_cuda.errors import PoolOverflow
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.layout import ImageLayout
from flexattn_cuda.mechanism.pool import NEW_AT_ONCE, HRPool
from flexattn_cuda.mechanism.tokens import HRTokens

_ATTRIBUTE = "flexattn"


@dataclass
class Counters:
    """Work done so far: HR tokens projected, in all layers together, and tiles encoded."""

    projected: int = 0
    encoded: int = 0


@dataclass
class HRCache:
    """The images of G prompts and the HR keys and values made of them.

    A new key/value cache that is filled with the tensors of an old one has no such thing beside it, which cannot be
    noticed: it answers as a model that never saw the images at high resolution. Copy or pickle the cache as a whole.

    The batch has B rows, B / G for each prompt (beams, samples), which share everything here.

    Attributes:
        settings: Of the mechanism, as they were when the images came.
        layout: Where the images stand in the sequence.
        tokens: Their HR tokens.
        capacity: Slots of every pool if these are fixed, None if they grow.
        pools: By layer, the keys and values that were ever needed there.
        crossed: By layer, the keys and values of LLaVA-XAttn, [G, H, I*T, d] each.
        rows: B.
        prompt_length: Positions up to the end of the latest prompt; the rows from its last one on see HR tokens.
        length: Positions after the latest call, as far as the host knows.
        counters: Work done so far.
        encoded_lately: Whether the latest call encoded a tile.
        unfinished: Whether a call is under way or ended in an error, so that some layers lack keys.
        position_offsets: Distance of the conversation's positions from a plain count, where its family keeps one.
    """

    settings: FlexAttnConfig
    layout: ImageLayout
    tokens: HRTokens
    capacity: int | None = None
    pools: dict[int, HRPool] = field(default_factory=dict)
    crossed: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    rows: int = 0
    prompt_length: int = 0
    length: int = 0
    counters: Counters = field(default_factory=Counters)
    encoded_lately: bool = False
    unfinished: bool = False
    position_offsets: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.capacity is not None:
            self.tokens.fix_addresses()

    @classmethod
    def beside(cls, cache: Cache | None) -> HRCache | None:
        """Return what is kept beside a key/value cache, if anything."""
        found: HRCache | None = getattr(cache, _ATTRIBUTE, None)
        return found

    def keep_beside(self, cache: Cache) -> None:
        """Make a key/value cache the owner of this one."""
        if not isinstance(cache, _OwnsHRCache):
            cache.__class__ = _owner_class(type(cache))
        setattr(cache, _ATTRIBUTE, self)

    @property
    def prompts(self) -> int:
        """G."""
        return self.layout.prompts

    @property
    def is_settled(self) -> bool:
        """Whether a decoding step is likely to bring few new tokens, all encoded, and to find room for them."""
        return not (self.tokens.waiting and self.encoded_lately) and all(p.is_settled for p in self.pools.values())

    def check_batch(self, batch: int, later: HRCache | None) -> None:
        """Raise unless a call's rows, and the images that come with it, are of the prompts whose images are kept here.

        Raises:
            ValueError: If they are not.
        """
        if later is not None and later.prompts != self.prompts:
            raise ValueError(
                f"the cache holds images of {self.prompts} prompts, but this call brings images of {later.prompts}; "
                "continue with the prompts that the cache was made from"
            )
        if batch % self.prompts:
            raise ValueError(f"this call has {batch} rows, but the cache holds images of {self.prompts} prompts")

    def append(self, later: HRCache) -> None:
        """Add the images of the same prompts' next turn, in a call that `begin` notes."""
        self.unfinished = True  # until the call has ended: an interrupt in here leaves some parts without them
        room = max(self.tokens.room, later.tokens.room)
        if self.tokens.room < room:
            self._make_room(room)
        if later.tokens.room < room:
            later.tokens.make_room(room)
        for pool in self.pools.values():
            pool.add_tokens(later.tokens.count)
        self.layout.append(later.layout)
        self.tokens.append(later.tokens)
        self.settings = later.settings

    def begin(self, cache: Cache | None, rows: int, length: int, prompt_length: int) -> None:
        """Note a call that ends at position `length`; with a cache it is unfinished until its layers have run."""
        self.rows, self.length, self.prompt_length = rows, length, prompt_length
        if cache is not None:
            self.keep_beside(cache)
            self.unfinished = True

    def cropped_with(self, cache: Cache, length: int) -> HRCache | None:
        """Follow a key/value cache that now holds `length` positions; return None if nothing is left beside it."""
        if length == 0:  # the cache is empty and free for another conversation
            forget_images(cache)
            return None
        if length < self.length:  # the next prompt replaces what was cropped
            self.prompt_length = min(self.prompt_length, length + 1)
            self.length = length
        self.layout.crop(length)
        return self

    def select_rows(self, rows: torch.Tensor) -> None:
        """Follow a key/value cache whose row i now is what its row `rows[i]` was."""
        if self.prompts > 1:
            prompts = rows.cpu() // (self.rows // self.prompts)
            kept = _runs_of_equals(prompts)
            if not torch.equal(kept, torch.arange(self.prompts)):
                self._select_prompts(kept)
        self.rows = len(rows)

    def repeat_rows(self, repeats: int) -> None:
        """Follow a key/value cache each of whose rows now stands there `repeats` times in a row."""
        self.rows *= repeats

    def check_overflow(self) -> None:
        """Wait for the device and raise if a step that read nothing back found no room for what it selected.

        Raises:
            PoolOverflow: If a pool is too small, or too many tokens were new at once.
        """
        overflows = [pool.overflow.to(self.tokens.features.device) for pool in self.pools.values() if pool.fixed]
        if not overflows:
            return
        without_slot, not_projected = torch.stack(overflows).sum(0).tolist()
        if without_slot:
            raise PoolOverflow(
                f"{without_slot} selected tokens found no room: hr_capacity={self.capacity} is too small"
            )
        if not_projected:
            raise PoolOverflow(
                f"{not_projected} selected tokens did not fit into one step, in which a layer with other projections "
                f"than plain linear layers takes {NEW_AT_ONCE} new ones for each row of the batch; decode without "
                "hr_capacity"
            )

    def _make_room(self, room: int) -> None:
        """Give every image room for so many HR tokens. Their numbers change; keys and values stay where they are."""
        for pool in self.pools.values():
            pool.make_room(self.tokens.images, room)
        self.tokens.make_room(room)
        self.crossed = {}  # to be projected again

    def _select_prompts(self, prompts: torch.Tensor) -> None:
        self.layout.select_prompts(prompts)
        self.tokens.select_prompts(prompts)
        for pool in self.pools.values():
            pool.select_prompts(prompts)
        self.crossed = {
            layer: (k[prompts.to(k.device)], v[prompts.to(v.device)]) for layer, (k, v) in self.crossed.items()
        }


def _runs_of_equals(values: torch.Tensor) -> torch.Tensor:
    """Return the value of each run, where `values` is cut into the longest runs of equals that all have one length."""
    for length in range(len(values), 1, -1):
        if len(values) % length == 0:
            runs = values.view(-1, length)
            if bool((runs == runs[:, :1]).all()):
                return runs[:, 0]
    return values


# ---------------------------------------------------------------------------------------------- transformers' own cache

_OWNERS: dict[type, type] = {}  # by class of a key/value cache, its subclass whose objects own an HR cache


class _OwnsHRCache(Cache):
    """What a key/value cache does to the HR cache beside it; mixed into the class of the object that owns one."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if (images := HRCache.beside(self)) is not None:
            images.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if (images := HRCache.beside(self)) is not None:
            index = torch.as_tensor(indices).cpu()
            images.select_rows(torch.arange(images.rows)[index])  # negative indices and bool masks too

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if (images := HRCache.beside(self)) is not None:
            images.repeat_rows(repeats)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # positive or negative: what it means differs between versions of transformers
        if (images := HRCache.beside(self)) is not None:
            images.cropped_with(self, int(self.get_seq_length()))

    def reset(self) -> None:
        super().reset()
        forget_images(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as an object of the cache's own class, to which the HR cache is given back."""
        return _restore, (type(self).__bases__[1],), dict(self.__dict__)


def forget_images(cache: Cache) -> None:
    """Drop what is kept beside a key/value cache, as if no image had ever been in it."""
    if HRCache.beside(cache) is not None:
        delattr(cache, _ATTRIBUTE)


def _owner_class(cache_class: type) -> type:
    """Return the subclass of a cache class whose objects own an HR cache."""
    if cache_class not in _OWNERS:
        _OWNERS[cache_class] = type(cache_class.__name__, (_OwnsHRCache, cache_class), {})
    return _OWNERS[cache_class]


def _restore(cache_class: type) -> Cache:
    return object.__new__(_owner_class(cache_class))
