"""A tiny random LLaVA with FlexAttention, and prompts and images for it: the one model configuration of the tests."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, StaticCache

from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT

VOCABULARY = 96
IMAGE = VOCABULARY - 1  # the image token's id is the last one
SIDE, ZOOM, PATCH = 6, 3, 8
THRESHOLD = 235.0


def settings(**changes) -> FlexAttnConfig:
    """Return the settings of FlexAttention that fit `llava_config`, with `changes`."""
    fields = dict(
        zoom=ZOOM, lowres_size=SIDE * PATCH, highres_size=SIDE * PATCH * ZOOM, first_layer=2, pool=3, threshold=48.0
    )
    return FlexAttnConfig(**(fields | changes))


# The flat maps of a random model cross these thresholds in a few cells only: selections differ from step to step.
_PAPER = {name: getattr(FlexAttnConfig.paper(), name) for name in ("hr_rows", "map_softmax", "scale", "pool", "warmup")}
PRESETS = {"released": settings(threshold=THRESHOLD), "paper": settings(**_PAPER, threshold=THRESHOLD / 255)}


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        projection_dim=16,
    )


def text_config(heads: int, kv_heads: int, layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def llava_config(
    heads: int = 4, kv_heads: int = 2, layers: int = 5, vocabulary: int = VOCABULARY, **changes
) -> LlavaConfig:
    """Return transformers' own configuration; the image token is the last of the vocabulary."""
    text = text_config(heads, kv_heads, layers, vocabulary)
    fields = dict(
        vision_config=vision_config().to_dict(),
        text_config=text.to_dict(),
        image_token_index=vocabulary - 1,
        image_seq_length=SIDE**2,
    )
    return LlavaConfig(**(fields | changes))


def flex_config(flexattn: FlexAttnConfig | None = None, **changes) -> FlexAttnLlavaConfig:
    """Return `llava_config(**changes)` with FlexAttention."""
    values = llava_config(**changes).to_dict()
    values.pop("model_type")
    return FlexAttnLlavaConfig(**values, flexattn_config=(flexattn or settings()).to_dict())


def sharpen(model: torch.nn.Module) -> torch.nn.Module:
    """Enlarge the weights, so that attention maps are not flat and a change anywhere shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def llava(seed: int = 0, **changes) -> LlavaForConditionalGeneration:
    """Return transformers' own model with random weights."""
    torch.manual_seed(seed)
    return sharpen(LlavaForConditionalGeneration(llava_config(**changes)))


def flex(flexattn: FlexAttnConfig | None = None, seed: int = 0, **changes) -> FlexAttnLlavaForConditionalGeneration:
    """Return the model with FlexAttention and random weights."""
    torch.manual_seed(seed)
    return sharpen(FlexAttnLlavaForConditionalGeneration(flex_config(flexattn, **changes)))


def prompt(*parts: int | str, seed: int = 0) -> torch.Tensor:
    """Return [N] token ids: a number stands for that many text tokens, "image" for the tokens of an image."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [
        torch.full((SIDE**2,), IMAGE) if part == "image" else torch.randint(3, 90, (part,), generator=generator)
        for part in parts
    ]
    return torch.cat(pieces)


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Return [count, 3, highres, highres] normalised pixels."""
    size = SIDE * PATCH * ZOOM
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(100 + seed))


def image_question(seed: int = 0, text: int = 9) -> dict[str, torch.Tensor]:
    """Return the inputs of a prompt with one image and `text` text tokens after it."""
    return {"input_ids": prompt(4, "image", text, seed=seed)[None], "pixel_values_hr": images(1, seed)}


def left_padded(*rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a batch of prompts of different lengths."""
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def mixed_batch() -> dict[str, torch.Tensor]:
    """Return different questions: two images in one prompt, one in another, and a row of text alone."""
    rows = [prompt(2, "image", 5, "image", 3, seed=1), prompt(4, "image", 9), prompt(7, seed=2)]
    return left_padded(*rows) | {"pixel_values_hr": images(3)}


def low_resolution(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same question without HR pixels."""
    size = (SIDE * PATCH, SIDE * PATCH)
    low = torch.nn.functional.interpolate(inputs["pixel_values_hr"], size=size, mode="bilinear", antialias=True)
    return {name: value for name, value in inputs.items() if name != "pixel_values_hr"} | {"pixel_values": low}


def decode_in_fixed_pools(model, step, inputs: dict[str, torch.Tensor], capacity: int, steps: int) -> torch.Tensor:
    """Answer greedily with a static cache, one call of `step` for each token; return the tokens [B, steps]."""
    mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config.text_config, max_cache_len=length + steps)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {CACHE_ARGUMENT: cache, "hr_capacity": capacity}
    logits = model(**inputs, position_ids=positions, **options).logits
    tokens, whole = [logits[:, -1:].argmax(-1)], torch.nn.functional.pad(mask, (0, steps))
    for number in range(steps - 1):
        whole[:, length + number] = 1
        call = dict(input_ids=tokens[-1].clone(), attention_mask=whole, position_ids=whole.sum(-1, keepdim=True) - 1)
        logits = step(**call, **{CACHE_ARGUMENT: cache}).logits
        HRCache.beside(cache).check_overflow()
        tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


def generate(model, steps: int = 6, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate greedily; return tokens [B, steps] and logits [B, steps, V]."""
    output = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return output.sequences[:, -steps:], torch.stack(output.logits, 1)
