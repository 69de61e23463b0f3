"""What the forward of a model with high-resolution (HR) images does before its language model runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.call import CallShape, Span
from flexattn_cuda.mechanism.grid import Grid


def cache_to_use(
    model: PreTrainedModel, use_cache: bool | None, cache: Cache | None, have_hr: bool
) -> tuple[bool, Cache | None]:
    """Return whether a call uses a key/value cache, and which. With HR images, a new one keeps every position."""
    text = model.config.get_text_config()
    if use_cache is None:
        use_cache = getattr(text, "use_cache", True) and not model.training
    if use_cache and cache is None:
        cache = DynamicCache() if have_hr else DynamicCache(config=text)
    return bool(use_cache), cache


def may_wait(cache: Cache | None, hr_capacity: int | None) -> bool:
    """Return whether tiles can be encoded when a selection reaches them: not in fixed shapes, nor with gradients."""
    kept = HRCache.beside(cache)
    capacity = hr_capacity if kept is None else kept.capacity
    return capacity is None and not torch.is_grad_enabled()


def image_positions(
    input_ids: torch.Tensor, image_token_id: int, shape: CallShape, prompt_length: int | None
) -> torch.Tensor:
    """Return [B, N] bool, True for an image token of the prompt, not for one that the model wrote or drafted."""
    is_image: torch.Tensor = input_ids == image_token_id
    if prompt_length is not None:
        is_image[:, max(0, prompt_length - shape.past) :] = False
    return is_image


def embed_text(model: PreTrainedModel, input_ids: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Embed token ids. An image token may lie outside the vocabulary; what is embedded for it does not matter."""
    embedding = model.get_input_embeddings()
    if image_token_id >= len(embedding.weight):
        input_ids = input_ids.masked_fill(input_ids == image_token_id, 0)
    embedded: torch.Tensor = embedding(input_ids)
    return embedded


def image_spans(is_image: torch.Tensor, tokens: Sequence[int]) -> list[list[Span]]:
    """Return where each image stands in each prompt.

    Args:
        is_image: [G, N] bool, True for an image token.
        tokens: Positions that each of the n images takes, in the order of the prompts; n >= 1.

    Raises:
        ValueError: If the image tokens are not these images, each without a gap.
    """
    spans: list[list[Span]] = []
    count = 0
    for row in is_image.cpu():
        left = row.nonzero().flatten().tolist()
        total, of_row = len(left), []
        while left:
            length = tokens[min(count, len(tokens) - 1)]
            taken, left = left[:length], left[length:]
            if taken[-1] - taken[0] != length - 1:
                raise ValueError(_refusal(total, tokens))
            of_row.append(Span(taken[0], taken[-1] + 1))
            count += 1
        spans.append(of_row)
    if count != len(tokens):
        raise ValueError(f"the prompts have room for {count} images, but {len(tokens)} came with them")
    return spans


def place(
    inputs_embeds: torch.Tensor,
    is_image: torch.Tensor,
    images: Sequence[torch.Tensor] | torch.Tensor,
    spans: list[list[Span]],
    rows_per_prompt: int,
) -> torch.Tensor:
    """Return the embeddings [B, N, D] with the tokens [*, D] of n images in place.

    The images are in the order of the prompts; `rows_per_prompt` adjacent rows of the batch repeat each prompt.
    """
    numbers = torch.arange(len(images)).split([len(prompt) for prompt in spans])
    order = [number for group in numbers for _ in range(rows_per_prompt) for number in group.tolist()]
    rows = torch.cat([images[number] for number in order])
    return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), rows.to(inputs_embeds))


def _refusal(found: int, tokens: Sequence[int]) -> str:
    each = (
        f"every image takes {tokens[0]}" if len(set(tokens)) == 1 else f"the images take {', '.join(map(str, tokens))}"
    )
    return (
        f"a prompt has {found} image tokens, but {each} of them without a gap; build prompts with the model's processor"
    )


def check_valid_rect(valid_rect: torch.Tensor, lr_grids: Sequence[Grid]) -> None:
    """Raise ValueError unless `valid_rect` holds a rectangle [4] int inside each of the grids."""
    count = len(lr_grids)
    if tuple(valid_rect.shape) != (count, 4):
        raise ValueError(f"valid_rect has shape {list(valid_rect.shape)}; it must be {[count, 4]}")
    if valid_rect.is_floating_point() or valid_rect.is_complex():
        raise ValueError(f"valid_rect is {valid_rect.dtype}; it must hold whole numbers of cells")
    if valid_rect.is_meta:
        return
    corner, end = valid_rect[:, :2], valid_rect[:, 2:]
    if bool(((corner < 0) | (corner >= end) | (end > valid_rect.new_tensor(lr_grids))).any()):
        sizes = " or ".join(dict.fromkeys(map(str, lr_grids)))
        raise ValueError(
            f"valid_rect is {valid_rect.tolist()}; every image needs top < bottom and left < right, inside its {sizes} "
            "LR cells"
        )
