"""A model of another family, to which FlexAttention was attached, is served too."""

from __future__ import annotations

import attached_checkpoint
import pytest
import served
from question_files import image
from test_api import png

import flexattn_cuda
from flexattn_cuda.serve.service import Service
from flexattn_cuda.tasks.load import load
from flexattn_cuda.tasks.options import ServeOptions

pytestmark = pytest.mark.slow


# transformers' own LLaVA is loaded as this package's.
@pytest.mark.parametrize("family", sorted(attached_checkpoint.CHECKPOINTS.keys() - {"llava", "llava_siglip"}))
def test_answers_and_traces_are_those_of_ask(family, tmp_path):
    folder = attached_checkpoint.CHECKPOINTS[family].save(tmp_path / family)
    with served.in_this_process(folder) as server:
        model, processor = server.service.model, server.service.processor
        for seed in (3, 4):
            asked = dict(model=server.name, messages=[served.message("what is this", png(seed))], max_tokens=4)
            completion = server.client().chat.completions.create(**asked, extra_body={"flexattn": {"trace": True}})
            expected = flexattn_cuda.ask(model, processor, image(seed=seed), "what is this", 4, trace=True)
            assert completion.choices[0].message.content == expected.text
            tokens = completion.flexattn["tokens"]
            assert [token["text"] for token in tokens if not token["end"]] == expected.pieces
            for token, step in zip(tokens, expected.trace.steps):
                shares = {int(layer): looked[0]["share"] for layer, looked in token["layers"].items()}
                assert shares == {
                    layer: pytest.approx(traced.of_image(0, -1, 0)[1].float().mean().item())
                    for layer, traced in step.items()
                }
        low = server.post(asked | {"flexattn": {"hr": False}}).json()["choices"][0]["message"]["content"]
        inputs = processor(images=[image(seed=4)], text=processor.prompt("what is this"))
        ids = model.generate(**inputs, hr_alpha=0.0, max_new_tokens=4, do_sample=False)
        assert low == processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", sorted(attached_checkpoint.CHECKPOINTS.keys() - {"llava", "llava_siglip"}))
def test_an_image_that_was_asked_about_before_is_not_encoded_again(family, tmp_path):
    folder = attached_checkpoint.CHECKPOINTS[family].save(tmp_path / family)
    with served.in_this_process(folder) as server:
        inner, calls = server.service.model.model, []
        name = next(one for one in ("vision_tower", "vision_model", "visual") if hasattr(inner, one))
        getattr(inner, name).register_forward_hook(lambda *_: calls.append(1))
        asked = [{"hr": True}, {"hr": True}, {"hr": False}]
        made = []
        for extension in asked:
            messages = [served.message("what is this", png(3))]
            body = dict(model=server.name, messages=messages, max_tokens=4, flexattn=extension)
            assert server.post(body).status_code == 200
            made.append(len(calls))
    if family in ("qwen2_vl", "qwen2_5_vl"):  # whose grids depend on the image: the pixels are kept
        assert 0 < made[0] < made[1] < made[2]
    else:
        assert 0 < made[0] == made[1] == made[2]


def test_a_model_without_maps_is_served_without_them(tmp_path):
    model, processor = load(None, "cpu", system="llava")
    service = Service(model, processor, ServeOptions(device="cpu"), "plain")
    assert service.layers == [] and not service.can_leave_hr_out
