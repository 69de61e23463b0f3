"""Qwen2-VL and Qwen2.5-VL: images of any aspect ratio, positions in time, rows and columns."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from flexattn_cuda import profiling
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.family import Family, Pixels, PromptWithImages, scaled_down
from flexattn_cuda.families.generation import POSITIONS_COME_FIRST
from flexattn_cuda.mechanism.grid import Grid, ImageGrids
from flexattn_cuda.mechanism.rotary import RotaryTables

# Older transformers find the positions of a row by the sizes of its images; newer ones would repeat these one by one.
_REPEATED = () if POSITIONS_COME_FIRST else ("image_grid_thw",)


class Qwen2VL(Family):
    """A token takes a square of patches; the HR image is cut into zoom x zoom tiles of the LR view's size."""

    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    row_arguments: ClassVar[tuple[str, ...]] = ("mm_token_type_ids", *_REPEATED)
    position_axes: ClassVar[int] = 3

    @property
    def token_size(self) -> int:
        """Side in pixels of the square that a token takes."""
        vision = self.model.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)

    def grids(self, pixels_hr: Pixels) -> list[ImageGrids]:
        zoom = self.settings.zoom
        unit = zoom * self.token_size
        grids = []
        for image in pixels_hr:
            sides = image.shape[1:]
            if image.ndim != 3 or image.shape[0] != 3 or any(side == 0 or side % unit for side in sides):
                raise InputError(
                    f"an image of pixel_values_hr has shape {list(image.shape)}; with zoom {zoom} this model takes [3, "
                    f"height, width] in multiples of {unit}"
                )
            lr = Grid(*(side // unit for side in sides))
            grids.append(ImageGrids(lr, Grid(zoom * lr.rows, zoom * lr.cols), Grid(zoom, zoom)))
        return grids

    def encode_lr(self, pixels_hr: Pixels, arguments: dict[str, Any]) -> list[torch.Tensor]:
        patches, sizes = arguments.get("pixel_values"), arguments.get("image_grid_thw")
        if arguments.get("pixel_values_videos") is not None:
            raise ValueError("pixel_values_videos came with high-resolution images; ask about images or about a video")
        with profiling.phase("encode_images"):
            if patches is None:
                zoom = self.settings.zoom
                views = (scaled_down(image[None], *(side // zoom for side in image.shape[1:])) for image in pixels_hr)
                return [self.encode(view)[0] for view in views]
            expected = [[1, *(side * self._merge for side in image.lr)] for image in self.grids(pixels_hr)]
            if sizes is None or sizes.tolist() != expected:
                raise ValueError(
                    f"image_grid_thw is {None if sizes is None else sizes.tolist()}; for these pixel_values_hr and "
                    f"zoom {self.settings.zoom} it must be {expected}"
                )
            return self._features(patches, sizes)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        patch = self.model.config.vision_config.patch_size
        n, _, height, width = pixels.shape
        sizes = torch.tensor([[1, height // patch, width // patch]] * n, device=pixels.device)
        return torch.stack(self._features(self._patches(pixels), sizes))

    def rotary(self, text: PreTrainedModel, sequence: torch.Tensor, positions: torch.Tensor) -> RotaryTables:
        cos, sin = text.rotary_emb(sequence, position_ids=positions[:, None])
        if cos.ndim == 4:  # older transformers take each section of the head from its axis in the attention module
            cos, sin = (_by_section(table[:, 0], text.config.rope_parameters["mrope_section"]) for table in (cos, sin))
        return RotaryTables(cos.view(-1, cos.shape[-1]), sin.view(-1, sin.shape[-1]))

    def position_ids(self, prompt: PromptWithImages) -> torch.Tensor:
        """Return [3, B, N], and let the model count on from there."""
        inner, every = self.model.model, prompt.rows_per_prompt
        ids, mask = prompt.input_ids[::every], prompt.attention_mask
        mask = None if mask is None else mask[::every]
        new = None if mask is None else mask[:, -ids.shape[1] :]
        grids = [(1, image.lr.rows * self._merge, image.lr.cols * self._merge) for image in prompt.grids]
        arguments = {"image_grid_thw": torch.tensor(grids, device=ids.device), "attention_mask": new}
        if "mm_token_type_ids" in inspect.signature(inner.get_rope_index).parameters:
            arguments["mm_token_type_ids"] = (ids == self.image_token_id).int()
        positions, deltas = inner.get_rope_index(ids, **arguments)
        if prompt.past:  # a later turn begins where the one before ended
            before = prompt.past if mask is None else mask[:, : prompt.past].sum(-1, keepdim=True)
            begin = before + inner.rope_deltas[::every].to(ids.device)
            positions, deltas = positions + begin, deltas + begin - before
        inner.rope_deltas = deltas.repeat_interleave(every, 0)
        repeated: torch.Tensor = positions.repeat_interleave(every, 1)
        return repeated

    @property
    def position_offsets(self) -> torch.Tensor | None:
        """Those of the conversation that the model ran last, [rows, 1]."""
        offsets: torch.Tensor | None = self.model.model.rope_deltas
        return offsets

    @position_offsets.setter
    def position_offsets(self, offsets: torch.Tensor) -> None:
        self.model.model.rope_deltas = offsets

    @property
    def _merge(self) -> int:
        return int(self.model.config.vision_config.spatial_merge_size)

    def _features(self, patches: torch.Tensor, sizes: torch.Tensor) -> list[torch.Tensor]:
        """Return the tokens [n, D] of each image of the packed patches."""
        features = self.model.model.get_image_features(patches, sizes)
        return list(getattr(features, "pooler_output", features))

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Cut images [n, 3, height, width] into the patches [*, 3*t*p*p] that the tower takes, a token's together."""
        vision, merge = self.model.config.vision_config, self._merge
        patch, frames = vision.patch_size, vision.temporal_patch_size
        n, channels, height, width = pixels.shape
        squares = pixels.view(
            n, channels, height // patch // merge, merge, patch, width // patch // merge, merge, patch
        )
        squares = squares.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [n, rows, cols, row in token, col in token, 3, p, p]
        # To the tower an image is a video whose frames are all the same.
        still = squares.unsqueeze(6).expand(*squares.shape[:6], frames, patch, patch)
        return still.reshape(-1, channels * frames * patch * patch)


def _by_section(table: torch.Tensor, sections: list[int]) -> torch.Tensor:
    """Return [n, d], each section of the head from its axis of [3, n, d]."""
    parts = table.split(list(sections) * 2, dim=-1)
    return torch.cat([part[number % 3] for number, part in enumerate(parts)], dim=-1)
