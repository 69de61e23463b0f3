"""Eight photographs and questions at once: every row is what it is alone.

`-s` prints how near a map came to the threshold.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import flexattn_cuda
from flexattn_cuda import Trace
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT

HELD_OUT = Path(__file__).parents[1] / "data" / "held_out"
TOKENS = 4


def questions() -> list[dict]:
    """Different photographs; questions of different lengths."""
    asked = json.loads((HELD_OUT / "questions.json").read_text())[:8]
    return [
        one | {"question": " ".join(["Please look closely."] * (number % 4) + [one["question"]])}
        for number, one in enumerate(asked)
    ]


def to_threshold(settings, trace: Trace, valid_rect: torch.Tensor) -> float:
    """Smallest distance of a cell of one image's normalised maps (0 to 1) to the threshold."""
    distance = 1.0
    top, left, bottom, right = valid_rect.tolist()
    for traced in (traced for step in trace.steps for traced in step.values()):
        attention_map = traced.map[0, -1, 0].double()
        side = round(len(attention_map) ** 0.5)
        inside = torch.zeros(side, side, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        shown = attention_map.where(inside.flatten(), 0)
        a = (shown - shown.min()) / (shown.max() - shown.min())
        distance = min(distance, (a - settings.threshold / settings.scale).abs().min().item())
    return distance


def answer(model, inputs):
    trace = Trace()
    output = model.generate(
        **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, flexattn_trace=trace,
    )  # fmt: skip
    valid_rect = HRCache.beside(output[CACHE_ARGUMENT]).layout.valid_rect
    return output.sequences[:, -TOKENS:], torch.stack(output.logits, 1), trace, valid_rect


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)], ids=["float32", "float64"]
)
def test_every_row_of_eight_is_what_it_is_alone(dtype, tolerance):
    model, processor = flexattn_cuda.load(device="cpu", dtype=dtype)
    asked = questions()
    images = [Image.open(HELD_OUT / one["file"]) for one in asked]
    assert len({image.size for image in images}) > 1
    prompts = [processor.prompt(one["question"]) for one in asked]
    inputs = processor(images=images, text=prompts, padding=True)
    assert not inputs["attention_mask"].bool().all()
    tokens, logits, trace, _ = answer(model, inputs)
    nearest = 1.0
    for row, (image, prompt) in enumerate(zip(images, prompts)):
        alone, theirs, own, valid_rect = answer(model, processor(images=image, text=prompt))
        assert torch.equal(tokens[row], alone[0])
        assert (logits[row] - theirs[0]).abs().max() <= tolerance
        for together, single in zip(trace.steps, own.steps):
            for layer, traced in single.items():
                assert torch.equal(together[layer].mask[row], traced.mask[0])
        nearest = min(nearest, to_threshold(model.config.flexattn, own, valid_rect[0, 0]))
    print(f"\n{str(dtype)[6:]}: smallest distance of a map to the threshold: {nearest:.2e}")
