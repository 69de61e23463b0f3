"""Small random models and prompts for tests, of the shapes that matter and nothing more."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaConfig, FlexAttnLlavaForConditionalGeneration

IMAGE = 95  # image token id, inside the vocabulary of 96
SIDE, ZOOM, PATCH = 6, 3, 8
THRESHOLD = 235.0


def settings(**changes) -> FlexAttnConfig:
    fields = dict(
        zoom=ZOOM,
        lowres_size=SIDE * PATCH,
        highres_size=SIDE * PATCH * ZOOM,
        first_layer=2,
        pool=3,
        threshold=48.0,
    )
    return FlexAttnConfig(**(fields | changes))


# Thresholds that a random model's flat maps cross here and there only, so that selections differ from step to step.
_PAPER = {name: getattr(FlexAttnConfig.paper(), name) for name in ("hr_rows", "map_softmax", "scale", "pool", "warmup")}
PRESETS = {
    "released": settings(threshold=THRESHOLD),
    "paper": settings(**_PAPER, threshold=THRESHOLD / 255),
}


def llava_config(heads: int = 4, kv_heads: int = 2, **changes) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE * PATCH,
            patch_size=PATCH,
            projection_dim=16,
        ).to_dict(),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=96,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ).to_dict(),
        image_token_index=IMAGE,
        image_seq_length=SIDE**2,
        **changes,
    )


def sharpen(model: torch.nn.Module) -> torch.nn.Module:
    """Larger weights, so that attention maps are not flat and a change anywhere shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def llava(seed: int = 0, **changes) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    return sharpen(LlavaForConditionalGeneration(llava_config(**changes)))


def flex(flexattn: FlexAttnConfig | None = None, seed: int = 0, **changes) -> FlexAttnLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    values = llava_config(**changes).to_dict()
    values.pop("model_type")
    config = FlexAttnLlavaConfig(**values, flexattn_config=(flexattn or settings()).to_dict())
    return sharpen(FlexAttnLlavaForConditionalGeneration(config))


def prompt(*parts: int | str, seed: int = 0) -> torch.Tensor:
    """[N] token ids: a number stands for that many text tokens, "image" for an image's tokens."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [
        torch.full((SIDE**2,), IMAGE) if part == "image" else torch.randint(3, 90, (part,), generator=generator)
        for part in parts
    ]
    return torch.cat(pieces)


def images(count: int, seed: int = 0) -> torch.Tensor:
    """[count, 3, highres, highres] normalised pixels."""
    size = SIDE * PATCH * ZOOM
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(100 + seed))


def left_padded(*rows: torch.Tensor) -> dict[str, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, steps: int = 6, **inputs):
    """Greedy generation -> (tokens [B, steps], logits [B, steps, V])."""
    output = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, -steps:], torch.stack(output.logits, 1)
