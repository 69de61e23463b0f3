"""From pixels to image tokens: the vision tower and the projector, for images and for tiles of images."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from transformers import LlavaModel

from flexattn_cuda import profiling
from flexattn_cuda.mechanism.grid import Grid, cut_into_tiles, join_tiles

# The tower's image size is set for the duration of a call, and older transformers replace its forward functions while
# they record its hidden states.
_ONE_AT_A_TIME = threading.Lock()


@profiling.in_phase("encode_images")
def encode_images(model: LlavaModel, pixels: torch.Tensor) -> torch.Tensor:
    """Encode square images into their tokens.

    Args:
        model: LLaVA's inner model (tower, projector, language model).
        pixels: [n, 3, s, s] float, normalised; s is at most the tower's own size.

    Returns:
        [n, (s / patch)**2, D], row-major, top-left first.
    """
    with _ONE_AT_A_TIME, _image_size(model, pixels.shape[-1]):
        features = model.get_image_features(
            pixel_values=pixels.to(model.dtype),
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            return_dict=True,
        )
    return torch.stack(list(features.pooler_output))


@profiling.in_phase("encode_tiles")
def encode_tiles(model: LlavaModel, image: torch.Tensor, zoom: int) -> torch.Tensor:
    """Encode one image into its HR tokens: zoom x zoom tiles are encoded separately and put back in place.

    Args:
        model: LLaVA's inner model.
        image: [3, zoom*s, zoom*s] float, normalised.
        zoom: Tiles per side.

    Returns:
        [h * h, D] with h = zoom * (s / patch), row-major over the whole image.
    """
    tiles = Grid(zoom, zoom)
    tokens = encode_images(model, torch.stack(cut_into_tiles(image, tiles)))
    side = int(tokens.shape[1] ** 0.5)
    return join_tiles(tokens, tiles, Grid(side, side))


@contextlib.contextmanager
def _image_size(model: LlavaModel, size: int) -> Iterator[None]:
    """Let the tower take images of this size; smaller ones use the top-left corner of its position embeddings."""
    embeddings = next(
        module for module in model.modules() if isinstance(getattr(module, "position_ids", None), torch.Tensor)
    )
    own, ids = embeddings.image_size, embeddings.position_ids
    if size == own:
        yield
        return
    native, side = own // embeddings.patch_size, size // embeddings.patch_size
    corner = torch.arange(native * native, device=ids.device).view(native, native)[:side, :side]
    embeddings.image_size = size
    embeddings.position_ids = torch.cat([ids.new_zeros(1), 1 + corner.flatten()])[None]
    try:
        yield
    finally:
        embeddings.image_size, embeddings.position_ids = own, ids
