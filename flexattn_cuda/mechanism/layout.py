"""Where the images of a batch of conversations stand in the sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from flexattn_cuda.mechanism.grid import ABSENT, BatchGrids, flat, max_cells, pooled_sizes, sizes_tensor


@dataclass
class ImageLayout:
    """The images of G prompts, I slots for each; a prompt with fewer images has empty slots.

    Attributes:
        grids: Of the images; ABSENT for an empty slot.
        ranges: [G, I, 2] int32, the first sequence key of each image's LR tokens and one past the last; (0, 0) when
            absent.
        valid_rect: [G, I, 4] int32, the image inside its padding in LR cells; all 0 when absent.
        lr_grid: [G, I, 2] int32, rows and columns of the images' LR tokens.
        hr_grid: [G, I, 2] int32, rows and columns of their HR tokens.
        cells: C, LR tokens of the largest image.
        ragged: Whether some image has fewer.
        last_end: One past the last LR token of any image.
    """

    grids: BatchGrids
    ranges: torch.Tensor
    valid_rect: torch.Tensor
    last_end: int = 0
    lr_grid: torch.Tensor = field(init=False)
    hr_grid: torch.Tensor = field(init=False)
    cells: int = field(init=False)
    ragged: bool = field(init=False)

    def __post_init__(self) -> None:
        self._set_grids(self.grids)

    @property
    def prompts(self) -> int:
        """G."""
        return self.ranges.shape[0]

    @property
    def images(self) -> int:
        """I."""
        return self.ranges.shape[1]

    @property
    def hr_tokens(self) -> int:
        """HR tokens of the largest image."""
        return max_cells(image.hr for image in flat(self.grids))

    def present(self) -> torch.Tensor:
        """Return [G, I] bool, False for an empty slot."""
        return self.ranges[..., 1] > self.ranges[..., 0]

    def on(self, device: torch.device, repeats: int, pool: int) -> RowLayout:
        """Return the layout of `repeats` rows of the batch for each prompt, on a device.

        A grid is pooled to one of its shape whose longer side has `pool` cells, if it has more; 0 for no pooling.
        """
        ranges, skipped = self.ranges, None
        if self.ragged:
            # The operator takes maps of one length. A smaller image's range is widened to it, over keys behind the
            # image, or before it where `last_end` leaves no others; the selection reads the image's own cells alone.
            first = ranges[..., 0].clamp(max=self.last_end - self.cells)
            widened = torch.stack([first, first + self.cells], -1)
            skipped = torch.where(self.present(), ranges[..., 0] - first, 0)
            ranges = torch.where(self.present()[..., None], widened, 0)

        def of_rows(part: torch.Tensor) -> torch.Tensor:
            part = part.to(device)
            return part if repeats == 1 else part.repeat_interleave(repeats, 0)

        return RowLayout(
            map_ranges=of_rows(ranges),
            valid_rect=of_rows(self.valid_rect),
            lr_grid=of_rows(self.lr_grid),
            hr_grid=of_rows(self.hr_grid),
            pool_grid=of_rows(pooled_sizes(self.lr_grid, pool)) if pool else None,
            skipped=None if skipped is None else of_rows(skipped),
        )

    def append(self, later: ImageLayout) -> None:
        """Add the images of the same prompts' next turn."""
        self.ranges = torch.cat([self.ranges, later.ranges.to(self.ranges.device)], dim=1)
        self.valid_rect = torch.cat([self.valid_rect, later.valid_rect.to(self.valid_rect.device)], dim=1)
        self.last_end = max(self.last_end, later.last_end)
        self._set_grids([mine + theirs for mine, theirs in zip(self.grids, later.grids)])

    def crop(self, length: int) -> None:
        """Empty the slots of the images whose LR tokens are not all among the first `length` positions."""
        if self.last_end <= length:
            return
        gone = self.ranges[..., 1] > length
        self.ranges = self.ranges.masked_fill(gone[..., None], 0)
        self.valid_rect = self.valid_rect.masked_fill(gone[..., None], 0)
        self.last_end = int(self.ranges.max())
        self._set_grids(
            [
                [ABSENT if empty else image for image, empty in zip(*of_prompt)]
                for of_prompt in zip(self.grids, gone.tolist())
            ]
        )

    def select_prompts(self, prompts: torch.Tensor) -> None:
        """Keep the prompts of these numbers, in this order."""
        on_device = prompts.to(self.ranges.device)
        self.ranges, self.valid_rect = self.ranges[on_device], self.valid_rect[on_device]
        self._set_grids([self.grids[prompt] for prompt in prompts.tolist()])

    def _set_grids(self, grids: BatchGrids) -> None:
        self.grids = grids
        self.cells = max_cells(image.lr for image in flat(grids))
        self.ragged = any(0 < image.lr.cells < self.cells for image in flat(grids))
        self.lr_grid = sizes_tensor([[image.lr for image in prompt] for prompt in grids], self.ranges.device)
        self.hr_grid = sizes_tensor([[image.hr for image in prompt] for prompt in grids], self.ranges.device)


@dataclass(frozen=True)
class RowLayout:
    """Where the images of B rows stand, for the operators; all int32.

    Attributes:
        map_ranges: [B, I, 2], C keys of each image that is present, its LR tokens among them.
        valid_rect: [B, I, 4], the image inside its padding in LR cells.
        lr_grid: [B, I, 2], rows and columns of its LR tokens.
        hr_grid: [B, I, 2], rows and columns of its HR tokens.
        pool_grid: [B, I, 2], rows and columns of the pooled grid; None without pooling.
        skipped: [B, I], how many keys of `map_ranges` stand before the image; None if none do.
    """

    map_ranges: torch.Tensor
    valid_rect: torch.Tensor
    lr_grid: torch.Tensor
    hr_grid: torch.Tensor
    pool_grid: torch.Tensor | None
    skipped: torch.Tensor | None

    def cells_first(self, attention_map: torch.Tensor) -> torch.Tensor:
        """Return a map [B, R, I, C] of `map_ranges` with every image's own cells at the start."""
        if self.skipped is None:
            return attention_map
        cells = attention_map.shape[-1]
        source = torch.arange(cells, device=attention_map.device) + self.skipped[:, None, :, None]
        return attention_map.gather(-1, source.clamp(max=cells - 1).expand_as(attention_map))
