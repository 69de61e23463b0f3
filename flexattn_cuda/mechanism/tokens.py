"""High-resolution (HR) tokens of a batch of conversations, and the tiles whose tokens have not been encoded yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from flexattn_cuda import ops, profiling
from flexattn_cuda.mechanism.grid import Grid
from flexattn_cuda.mechanism.rotary import RotaryTables

EncodeTiles = Callable[[torch.Tensor], torch.Tensor]  # [n, 3, s, s] -> [n, tokens of a tile, D]


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
    """The HR tokens of G prompts with I image slots each.

    Attributes:
        grid: h x h, of the tokens of an image.
        tile_grid: zoom x zoom, of the tiles of an image.
        features: [G, I*h*h, D] output of the projector, zero for tiles that have not been encoded yet.
        tables: [G, I*h*h, d] rotary tables of the keys.
        waiting: Pixels [3, s, s] of the tiles that have not been encoded yet.
    """

    grid: Grid
    tile_grid: Grid
    features: torch.Tensor
    tables: RotaryTables
    waiting: dict[Tile, torch.Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """HR tokens of a prompt, I*h*h."""
        return self.features.shape[1]

    @property
    def images(self) -> int:
        """I."""
        return self.count // self.grid.cells

    @property
    def tile_count(self) -> int:
        """Tiles of all prompts and images."""
        return self.features.shape[0] * self.images * self.tile_grid.cells

    @property
    def tile_tokens(self) -> Grid:
        """Grid of the tokens of one tile."""
        return Grid(self.grid.rows // self.tile_grid.rows, self.grid.cols // self.tile_grid.cols)

    def tile_numbers(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [n] int64, the tile that each token lies in; tokens and tiles are counted over prompts and images."""
        image, token = tokens.long() // self.grid.cells, tokens.long() % self.grid.cells
        row = token // self.grid.cols // self.tile_tokens.rows
        col = token % self.grid.cols // self.tile_tokens.cols
        return (image * self.tile_grid.rows + row) * self.tile_grid.cols + col

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
        each = self.tile_grid.cells
        tiles = [Tile(*divmod(number // each, self.images), number % each) for number in numbers]
        tiles = [tile for tile in tiles if tile in self.waiting]
        if tiles and self.features.is_inference() and not torch.is_inference_mode_enabled():
            self.features = self.features.clone()  # tensors made in inference mode may not be written outside it
        for start in range(0, len(tiles), each):  # as many at once as an image has
            self._encode_batch(tiles[start : start + each], encode)
        return len(tiles)

    def append(self, later: HRTokens) -> None:
        """Add the tokens of the same prompts' next turn."""
        device, images = self.features.device, self.images
        self.features = torch.cat([self.features, later.features.to(device)], dim=1)
        self.tables = RotaryTables(
            *(torch.cat([mine, theirs.to(device)], dim=1) for mine, theirs in zip(self.tables, later.tables))
        )
        self.waiting |= {tile._replace(image=images + tile.image): pixels for tile, pixels in later.waiting.items()}

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

    def _encode_batch(self, tiles: list[Tile], encode: EncodeTiles) -> None:
        rows, cols = self.tile_tokens
        shape = (-1, self.images, self.tile_grid.rows, rows, self.tile_grid.cols, cols, self.features.shape[-1])
        with profiling.phase("encode_tiles"):
            encoded = encode(torch.stack([self.waiting[tile] for tile in tiles])).to(self.features)
        grid = self.features.view(shape)
        for tile, tokens in zip(tiles, encoded):
            tile_row, tile_col = divmod(tile.number, self.tile_grid.cols)
            grid[tile.prompt, tile.image, tile_row, :, tile_col] = tokens.view(rows, cols, -1)
            del self.waiting[tile]
