"""From pixels to image tokens: the vision tower and the projector, for photos and for tiles of photos."""

from __future__ import annotations

import copy
import threading

import torch
from torch import nn
from transformers import LlavaModel

from flexattn_cuda import profiling

# Older transformers exchange the tower's forward functions while they record its hidden states.
_ONE_AT_A_TIME = threading.Lock()


@profiling.in_phase("encode_pictures")
def encode_pictures(model: LlavaModel, pixels: torch.Tensor) -> torch.Tensor:
    """Image tokens of square pictures.

    Args:
        model: LLaVA's inner model (tower, projector, language model).
        pixels: [n, 3, s, s] float, normalised; s is the tower's own size or smaller.
    Returns:
        [n, (s / patch)**2, D], row-major, top-left first.
    """
    sized = _with_picture_size(model, pixels.shape[-1])
    with _ONE_AT_A_TIME:
        features = sized.get_image_features(
            pixel_values=pixels.to(sized.dtype),
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            return_dict=True,
        )
    return torch.stack(list(features.pooler_output))


def cut_into_tiles(photo: torch.Tensor, zoom: int) -> list[torch.Tensor]:
    """[3, zoom*s, zoom*s] -> zoom*zoom views of [3, s, s], row-major."""
    return [tile for row in photo.chunk(zoom, dim=1) for tile in row.chunk(zoom, dim=2)]


@profiling.in_phase("encode_tiles")
def encode_tiles(model: LlavaModel, photo: torch.Tensor, zoom: int) -> torch.Tensor:
    """HR tokens of one photo: zoom x zoom tiles encoded on their own and put back in place.

    Args:
        photo: [3, zoom * s, zoom * s] float, normalised.
    Returns:
        [h * h, D] with h = zoom * (s / patch), row-major over the whole photo.
    """
    tokens = encode_pictures(model, torch.stack(cut_into_tiles(photo, zoom)))
    side = int(tokens.shape[1] ** 0.5)
    # [tile row, tile column, row, column, D] -> [tile row, row, tile column, column, D]
    return tokens.reshape(zoom, zoom, side, side, -1).transpose(1, 2).reshape(zoom * zoom * side * side, -1)


def _with_picture_size(model: LlavaModel, size: int) -> LlavaModel:
    """`model`, or a view on the same weights whose tower takes smaller pictures.

    A picture smaller than the tower's native one uses the top-left corner of its position table.
    """
    path, embeddings = next(
        (name, module) for name, module in model.named_modules() if isinstance(getattr(module, "position_ids", None), torch.Tensor)
    )
    if size == embeddings.image_size:
        return model
    native, side = embeddings.image_size // embeddings.patch_size, size // embeddings.patch_size
    corner = torch.arange(native * native, device=embeddings.position_ids.device).view(native, native)[:side, :side]
    ids = torch.cat([embeddings.position_ids.new_zeros(1), 1 + corner.flatten()])

    view = root = _shallow_copy(model)
    for name in path.split("."):
        view._modules[name] = _shallow_copy(view._modules[name])
        view = view._modules[name]
    view.image_size = size
    view._buffers["position_ids"] = ids[None]
    return root


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A module of its own that shares every weight, so that changing a child or a buffer leaves the original alone."""
    twin = copy.copy(module)
    twin._modules, twin._buffers = dict(module._modules), dict(module._buffers)
    return twin
