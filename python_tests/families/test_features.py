"""Images as tokens that were encoded before: what they give is what their pixels give."""

import pytest
import torch
from tiny_families import FAMILIES, Family

import flexattn_cuda

FOUR = (1, 2, 1, 0)  # images of the prompts of a batch
_IMAGES = ("pixel_values", "pixel_values_hr", "pixel_attention_mask", "image_grid_thw", "image_sizes")

of_one_size = pytest.mark.parametrize("family", [f for f in FAMILIES.values() if not f.any_size], ids=str)


def attached(family: Family, dtype: torch.dtype = torch.float64):
    return flexattn_cuda.attach(family.model(dtype=dtype), family.settings())


def split(inputs: dict) -> tuple[dict, dict]:
    """Return the images among inputs, and the rest."""
    images = {name: value for name, value in inputs.items() if name in _IMAGES}
    return images, {name: value for name, value in inputs.items() if name not in _IMAGES}


@torch.no_grad()
@of_one_size
def test_features_give_what_their_pixels_give(family):
    model, inputs = attached(family), family.inputs(FOUR, dtype=torch.float64)
    images, text = split(inputs)
    lr, hr = model.encode(**images)
    seen = inputs["attention_mask"].bool()
    from_features = model(**text, image_features=lr, hr_features=hr).logits[seen]
    assert torch.allclose(from_features, model(**inputs).logits[seen], rtol=0, atol=1e-12 * from_features.abs().max())


@torch.no_grad()
@of_one_size
def test_features_of_the_low_resolution_alone_see_no_hr_tokens(family):
    plain, model = family.model(dtype=torch.float64), attached(family)
    inputs = family.inputs((1, 1), dtype=torch.float64)
    images, text = split(inputs)
    lr, _ = model.encode(**images)
    seen = inputs["attention_mask"].bool()
    without_hr = model(**text, image_features=torch.stack(lr)).logits[seen]
    with_hr = model(**inputs).logits[seen]
    assert not torch.allclose(without_hr, with_hr, rtol=0, atol=1e-6)
    embedded = plain.get_input_embeddings()(text["input_ids"].clamp(max=len(plain.get_input_embeddings().weight) - 1))
    if family.name in ("llava", "internvl_qwen2"):  # no bidirectional prefix, no embedding scale
        is_image = text["input_ids"] == model.hr_family.image_token_id
        embedded = embedded.masked_scatter(is_image[..., None], torch.cat(lr))
        del text["input_ids"]
        wanted = plain(**text, inputs_embeds=embedded).logits[seen]
        assert torch.allclose(without_hr, wanted, rtol=0, atol=1e-12 * wanted.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generate_takes_features(options):
    family = FAMILIES["internvl_qwen2"]
    model, inputs = attached(family), family.inputs((1, 2), dtype=torch.float64)
    inputs.pop("position_ids", None)  # `generate` finds them itself
    images, text = split(inputs)
    lr, hr = model.encode(**images)
    options = options | {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**text, image_features=lr, hr_features=hr, **options), wanted)
    low = model.generate(**text, image_features=lr, **options)
    assert not torch.equal(low, wanted)


def test_no_gradient_flows_through_hr_features():
    family = FAMILIES["internvl_qwen2"]
    model, inputs = attached(family), family.inputs((1,), dtype=torch.float64)
    images, text = split(inputs)
    lr, hr = (torch.stack(tokens).detach().requires_grad_() for tokens in model.encode(**images))
    model(**text, image_features=lr, hr_features=hr, labels=text["input_ids"]).loss.backward()
    assert lr.grad is not None and lr.grad.abs().max() > 0 and hr.grad is None


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"hr_features": None, "valid_rect": torch.tensor([[0, 0, 1, 1]])}, "valid_rect came without pixel_values_hr"),
        ({"image_features": None}, "hr_features need image_features"),
        ({"pixel_values_hr": torch.zeros(1, 3, 64, 64)}, "either pixels or features"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32)}, "either pixels or features"),
        ({"image_features": torch.zeros(1, 15, 64)}, r"holds 1 images of shape \[15, 64\]; .* 1 of \[16, 64\]"),
        ({"hr_features": torch.zeros(2, 64, 64)}, r"holds 2 images of shape \[64, 64\]; .* 1 of \[64, 64\]"),
        ({"hr_features": torch.zeros(1, 64, 64, dtype=torch.int64)}, "hr_features is torch.int64"),
        ({"image_features": "a"}, "image_features is a str"),
    ],
)
def test_features_that_would_be_misread_are_refused(changed, says):
    family = FAMILIES["internvl_qwen2"]
    model = attached(family, torch.float32)
    _, text = split(family.inputs((1,)))
    features = {"image_features": torch.zeros(1, 16, 64), "hr_features": torch.zeros(1, 64, 64)}
    with pytest.raises(ValueError, match=says):
        model(**text | features | changed)


def test_images_with_grids_of_their_own_are_refused_as_features():
    family = FAMILIES["qwen2_vl"]
    model = attached(family, torch.float32)
    _, text = split(family.inputs((1,)))
    with pytest.raises(ValueError, match="qwen2_vl model, whose images have grids of their own; pass pixel_values_hr"):
        model(**text, image_features=torch.zeros(1, 16, 64), hr_features=torch.zeros(1, 64, 64))
