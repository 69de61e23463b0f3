"""High-resolution (HR) tokens of a batch of conversations, and the tiles whose tokens have not been encoded yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from flexattn_cuda import ops, profiling
from flexattn_cuda.mechanism.grid import BatchGrids, flat, max_cells
from flexattn_cuda.mechanism.rotary import RotaryTables

EncodeTiles = Callable[[torch.Tensor], torch.Tensor]  # [n, 3, height, width] -> [n, tokens of a tile, D]


class Tile(NamedTuple):
    """A tile of an image: numbers of the prompt, of the image in it, and of the tile in the image (row-major)."""

    prompt: int
    image: int
    number: int


class TokenRows(NamedTuple):
    """HR tokens as a layer needs them: features [n, D], and rotary tables [n, d]."""

    features: torch.Tensor
    tables: RotaryTables


@dataclass
class HRTokens:
    """The HR tokens of G prompts with I image slots each, T for every slot; an image with fewer leaves the rest unused.

    Attributes:
        grids: Of the images; ABSENT for a slot that never held one.
        features: [G, I*T, D] output of the projector, zero for tiles that have not been encoded yet.
        tables: [G, I*T, d] rotary tables of the keys.
        waiting: Pixels [3, height, width] of the tiles that have not been encoded yet.
        fixed: Whether features and tables keep their addresses from one decoding step to the next (CUDA graphs).
    """

    grids: BatchGrids
    features: torch.Tensor
    tables: RotaryTables
    waiting: dict[Tile, torch.Tensor] = field(default_factory=dict)
    fixed: bool = False
    _tile_room: int = field(init=False, repr=False)
    _is_waiting: torch.Tensor | None = field(init=False, repr=False)  # [G*I*T + 1] bool; made when it is asked for

    def __post_init__(self) -> None:
        self._tokens_changed()

    @property
    def count(self) -> int:
        """HR tokens that a prompt has room for, I*T."""
        return self.features.shape[1]

    @property
    def images(self) -> int:
        """I."""
        return len(self.grids[0])

    @property
    def room(self) -> int:
        """T, HR tokens that an image has room for."""
        return self.count // self.images

    @property
    def tile_count(self) -> int:
        """Tile numbers of all prompts and images."""
        return len(self.grids) * self.images * self._tile_room

    def fix_addresses(self) -> None:
        """Keep features and tables where they are from one decoding step to the next."""
        self.fixed = True
        self._tokens_changed()

    def tile_numbers(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [n] int64, the tile that each token lies in; tokens and tiles are counted over prompts and images."""
        image, token = tokens.long() // self.room, tokens.long() % self.room
        cols, tile_rows, tile_cols, tiles_across = self._tilings.to(tokens.device)[image].unbind(-1)
        row, col = token // cols // tile_rows, token % cols // tile_cols
        return image * self._tile_room + row * tiles_across + col

    def gather(self, tokens: torch.Tensor, device: torch.device) -> TokenRows:
        """Return the rows of the tokens [n], counted over prompts, on a device; zeros where the token is -1."""
        index = tokens[None].to(self.features.device)
        features, cos, sin = (
            ops.gather_tokens(table.flatten(0, 1)[None], index)[0].to(device) for table in (self.features, *self.tables)
        )
        return TokenRows(features, RotaryTables(cos, sin))

    def encode(self, numbers: Iterable[int], encode: EncodeTiles) -> int:
        """Fill in the features of the waiting tiles among these numbers, which count as in `tile_numbers`.

        Returns:
            How many tiles were encoded.
        """
        each = self._tile_room
        tiles = [Tile(*divmod(number // each, self.images), number % each) for number in numbers]
        tiles = [tile for tile in tiles if tile in self.waiting]
        if tiles and self.features.is_inference() and not torch.is_inference_mode_enabled():
            self.features = self.features.clone()  # tensors made in inference mode may not be written outside it
        alike: dict[torch.Size, list[Tile]] = {}  # by size in pixels
        for tile in tiles:
            alike.setdefault(self.waiting[tile].shape, []).append(tile)
        for batch in alike.values():
            for start in range(0, len(batch), each):  # as many at once as an image has
                self._encode_batch(batch[start : start + each], encode)
        return len(tiles)

    def append(self, later: HRTokens) -> None:
        """Add the tokens of the same prompts' next turn. Both have the same room T."""
        device, images = self.features.device, self.images
        self.features = torch.cat([self.features, later.features.to(device)], dim=1)
        self.tables = RotaryTables(
            *(torch.cat([mine, theirs.to(device)], dim=1) for mine, theirs in zip(self.tables, later.tables))
        )
        self.waiting |= {tile._replace(image=images + tile.image): pixels for tile, pixels in later.waiting.items()}
        self.grids = [mine + theirs for mine, theirs in zip(self.grids, later.grids)]
        self._tokens_changed()

    def make_room(self, room: int) -> None:
        """Give every image room for so many tokens, which changes the tokens' numbers."""
        images = self.images
        self.features = with_room(self.features, images, room)
        self.tables = RotaryTables(*(with_room(table, images, room) for table in self.tables))
        self._tokens_changed()

    def select_prompts(self, prompts: torch.Tensor) -> None:
        """Keep the prompts of these numbers, in this order."""
        index = prompts.to(self.features.device)
        self.features = self.features[index]
        self.tables = RotaryTables(*(table[index] for table in self.tables))
        self.waiting = {
            tile._replace(prompt=new): pixels
            for new, old in enumerate(prompts.tolist())
            for tile, pixels in self.waiting.items()
            if tile.prompt == old
        }
        self.grids = [self.grids[prompt] for prompt in prompts.tolist()]
        self._tokens_changed()

    def any_waiting(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [1] bool, whether one of the tokens [n], counted over prompts, lies in a tile that is not encoded."""
        if self._is_waiting is None:
            flags = torch.zeros(self.tile_count, dtype=torch.bool)
            for tile in self.waiting:
                flags[(tile.prompt * self.images + tile.image) * self._tile_room + tile.number] = True
            every = torch.arange(len(self.grids) * self.count, device=self.features.device)
            of_token = flags.to(every.device)[self.tile_numbers(every).clamp(max=self.tile_count - 1)]
            self._is_waiting = torch.cat([of_token, of_token.new_zeros(1)])  # the last flag is that of token -1
        return self._is_waiting[tokens.to(self.features.device)].any()[None]

    def _encode_batch(self, tiles: list[Tile], encode: EncodeTiles) -> None:
        with profiling.phase("encode_tiles"):
            encoded = encode(torch.stack([self.waiting[tile] for tile in tiles])).to(self.features)
        of_images = self.features.unflatten(1, (self.images, self.room))  # a view
        for tile, tokens in zip(tiles, encoded):
            image = self.grids[tile.prompt][tile.image]
            (rows, cols), (tile_row, tile_col) = image.tile, divmod(tile.number, image.tiles.cols)
            grid = of_images[tile.prompt, tile.image, : image.hr.cells].view(*image.hr, -1)
            at_row, at_col = tile_row * rows, tile_col * cols
            grid[at_row : at_row + rows, at_col : at_col + cols] = tokens.view(rows, cols, -1)
            del self.waiting[tile]
        self._is_waiting = None

    def _tokens_changed(self) -> None:
        """Follow new tensors or images. Every image has room for as many tiles as the one with the most."""
        self._is_waiting = None
        if self.fixed:
            for tensor in (self.features, *self.tables):
                torch._dynamo.mark_static_address(tensor)
        images = flat(self.grids)
        self._tile_room = max_cells(image.tiles for image in images)
        tilings = [(image.hr.cols, *image.tile, image.tiles.cols) for image in images]
        self._tilings = torch.tensor(tilings, device=self.features.device).clamp(min=1)  # no division by 0


def with_room(rows: torch.Tensor, images: int, room: int, fill: int = 0) -> torch.Tensor:
    """Return rows [G, I*T, ...] of HR tokens as they are with room for `room` >= T tokens of an image."""
    of_images = rows.unflatten(1, (images, rows.shape[1] // images))
    added = of_images.new_full((*of_images.shape[:2], room - of_images.shape[2], *of_images.shape[3:]), fill)
    return torch.cat([of_images, added], dim=2).flatten(1, 2)
