"""Finding the layer that looks at the right place: in a made model, one layer's attention is on what is bright."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attached_checkpoint import CHECKPOINTS, tokenizer
from PIL import Image
from tiny_families import FAMILIES
from torch.nn import functional
from transformers import PreTrainedModel

import flexattn_cuda
from flexattn_cuda import Pointed, Trace, tune
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.towers import LlavaTower
from flexattn_cuda.inputs.hr_processor import HRProcessor, ProcessorParts

PLANTED = 3  # the layer
CONSTANT, BRIGHT = 0, 1  # dimensions of the hidden states
LOWEST = 7  # the dimension of a head of 16 that rotary positions turn least


class BrightTower(LlavaTower):
    """Tokens that say how bright their cell is; what else they say is noise."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        patch = self.lr_size // self.lr_side
        patches = functional.unfold(pixels, patch, stride=patch).transpose(1, 2)
        mixed = torch.randn(patches.shape[-1], self.model.config.text_config.hidden_size, generator=_seeded())
        tokens = functional.normalize(patches @ mixed, dim=-1) * 2
        tokens[..., CONSTANT], tokens[..., BRIGHT] = 4.0, patches.mean(-1)
        return tokens


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def planted() -> PreTrainedModel:
    """A LLaVA in whose planted layer every query asks for bright cells."""
    model = FAMILIES["llava"].model()
    text = model.model.language_model
    for parameter in text.parameters():
        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=_seeded()) + (parameter.ndim == 1))
    text.embed_tokens.weight[:, CONSTANT] = 4.0
    attention = text.layers[PLANTED].self_attn
    for projection, dimension in ((attention.q_proj, CONSTANT), (attention.k_proj, BRIGHT)):
        heads = projection.weight.view(-1, attention.head_dim, projection.in_features)
        heads[:, LOWEST] = 0.0
        heads[:, LOWEST, dimension] = 4.0
    return flexattn_cuda.attach(model, FAMILIES["llava"].settings("paper", first_layer=2), family=BrightTower)


def processor_of(model: PreTrainedModel) -> HRProcessor:
    checkpoint = CHECKPOINTS["llava"]
    parts = ProcessorParts(checkpoint.image_processor(), tokenizer(checkpoint.image_token, checkpoint.mark))
    return flexattn_cuda.processor_for(model, parts)


def pointed(left: int, top: int, side: int = 48) -> Pointed:
    """A dark square image of noise with one bright square, and the question where."""
    noise = torch.randint(0, 60, (120, 120, 3), generator=_seeded(), dtype=torch.uint8)
    noise[top : top + side, left : left + side] += 190
    return Pointed(Image.fromarray(noise.numpy()), "what is this", (left, top, left + side, top + side))


EXAMPLES = [pointed(0, 48), pointed(72, 72), pointed(24, 0)]  # of whole cells


@pytest.mark.parametrize("boxes", [True, False], ids=["boxes", "entropy"])
def test_the_planted_layer_is_found(boxes):
    model = planted()
    examples = EXAMPLES if boxes else [dataclasses.replace(example, box=None) for example in EXAMPLES]
    tuning = tune(model, processor_of(model), examples)
    assert tuning.measure == ("boxes" if boxes else "entropy")
    assert tuning.map_layer == PLANTED and model.flexattn_settings == tuning.settings
    if boxes:
        assert tuning.scores[PLANTED] > 0.95
    others = [score for layer, score in tuning.scores.items() if layer != PLANTED]
    assert len(others) == 3 and max(others) < tuning.scores[PLANTED] - 0.1


def test_the_threshold_selects_the_share_that_was_asked_for():
    shares = []
    for share in (0.08, 0.3):
        model = planted()
        tuning = tune(model, processor_of(model), EXAMPLES, share=share)
        shares.append(tuning.share)
        assert 0 < tuning.share <= share
    assert shares[0] < shares[1]


@torch.no_grad()
def test_the_tuned_model_looks_at_what_is_bright():
    model = planted()
    processor, trace = processor_of(model), Trace()
    tune(model, processor, EXAMPLES)
    inputs = processor(images=[EXAMPLES[0].image], text=processor.prompt("what is this"))
    model(**inputs, flexattn_trace=trace)
    mask = trace.steps[0][PLANTED].of_image(0, -1, 0)[1]
    assert mask.shape == (10, 10) and mask.any()
    assert mask[4:8, :4].sum() == mask.sum()
    layers = model.model.language_model.layers
    assert [hasattr(layer.self_attn, "k_proj_hd") for layer in layers] == [False] * 4 + [True]


@pytest.mark.parametrize(
    "examples, share, says",
    [
        ([], 0.1, "0 of 0 examples have a box; pass at least one"),
        ([EXAMPLES[0], dataclasses.replace(EXAMPLES[1], box=None)], 0.1, "1 of 2 examples have a box"),
        (EXAMPLES, 1.0, "share is 1.0; it must lie between 0 and 1"),
        ([dataclasses.replace(EXAMPLES[0], box=(0, 0, 120, 120))], 0.1, "covers all of the 5 x 5 cells"),
        ([dataclasses.replace(EXAMPLES[0], box=(500, 500, 600, 600))], 0.1, "covers nothing of the 5 x 5 cells"),
    ],
)
def test_examples_that_show_nothing_are_refused(examples, share, says):
    model = planted()
    with pytest.raises(InputError, match=says):
        tune(model, processor_of(model), examples, share=share)
    assert model.flexattn_settings.first_layer == 2


def test_a_model_without_flexattention_is_refused():
    model = planted()
    with pytest.raises(ValueError, match="FlexAttention is not attached to this LlavaForConditionalGeneration"):
        tune(FAMILIES["llava"].model(), processor_of(model), EXAMPLES)
