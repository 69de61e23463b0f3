"""The study's second backbone: transformers' own InternVL, which FlexAttention is attached to."""

import dataclasses

import pytest
import torch
from small_study import photograph
from transformers import AutoModelForImageTextToText

from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.load import load
from studies.small.backbones import BACKBONES, backbone_of
from studies.small.batches import pack_scenes, question_batch
from studies.small.collection import Examples
from studies.small.encoded_scenes import encode_scenes, resolutions_of
from studies.small.encoder_stage import train_encoder, whiten
from studies.small.finetuning import run_system
from studies.small.outcomes import Outcome
from studies.small.presets import PRESETS, settings_for
from studies.small.questions import vocabulary
from studies.small.scenes import make_scenes
from studies.small.start import make_start

PRESET = PRESETS["internvl-tiny"]
SIZES = dataclasses.replace(PRESET.sizes, vision_layers=1, layers=3)
FLEXATTN = settings_for("flexattn", SIZES)
BACKBONE = BACKBONES["internvl"]


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    return BACKBONE.build(vocabulary(), FLEXATTN, SIZES)


@pytest.fixture(scope="module")
def saved(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    BACKBONE.save(*built, folder)
    return folder


@pytest.fixture(scope="module")
def encoded(built):
    return encode_scenes(*built, make_scenes([photograph(0)], 6, seed=0), 6, resolutions_of([FLEXATTN]))


@torch.no_grad()
@pytest.mark.parametrize("settings", [None, FLEXATTN], ids=["low", "flexattn"])
def test_images_and_their_features_are_answered_alike(saved, encoded, settings):
    """Within the rounding of the features to half: 2^-11 of values of a few units, through a few layers."""
    model, processor = BACKBONE.load_as(saved, settings)
    assert backbone_of(model) is BACKBONE
    scene = next(make_scenes([photograph(0)], 1, seed=0))
    inputs = processor(images=BACKBONE.asked_about(scene.image), text=processor.prompt(scene.asked.text))
    if settings is None:
        inputs.pop("pixel_values_hr")
    features = question_batch(encoded, encoded.asked()[:1], processor, settings, answers=False)
    assert torch.equal(features["input_ids"], inputs["input_ids"])
    features.pop("valid_rect", None)  # the processor does not know that the image was padded before
    torch.testing.assert_close(model(**features).logits, model(**inputs).logits, atol=2e-2, rtol=0)


@torch.no_grad()
def test_packed_questions_have_the_image_between_its_marks(saved, encoded):
    _, processor = BACKBONE.load_as(saved, FLEXATTN)
    packed = pack_scenes(encoded, [0, 3], processor)
    start, end = (processor.tokenizer.convert_tokens_to_ids(mark) for mark in ("<img>", "</img>"))
    for row in packed.input_ids.tolist():
        image = [position for position, token in enumerate(row) if token == processor.image_token_id]
        assert len(image) == SIZES.lr_side**2 == image[-1] - image[0] + 1
        assert row[image[0] - 1] == start and row[image[-1] + 1] == end


def test_the_plain_model_is_saved_without_an_adapter(saved, tmp_path):
    for name, settings in (("llava", None), ("flexattn", FLEXATTN)):
        model, processor = BACKBONE.load_as(saved, settings)
        BACKBONE.save(model, processor, tmp_path / name)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict()
        kept = {name: weight for name, weight in model.state_dict().items() if "_proj_hd." not in name}
        assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)
        assert (tmp_path / name / "flexattn_adapter.json").exists() == (settings is not None)


def test_the_encoder_stage_sees_the_zoom_of_its_systems_alone(built):
    model, processor = built
    preset = dataclasses.replace(PRESET, encoder_steps=3, sizes=SIZES)
    before = model.model.multi_modal_projector.linear_1.weight.clone()
    right = train_encoder(model, processor, [photograph(0)], [photograph(1)], preset, batch=2)
    assert set(right) == {"low", "zoom 3 small", "zoom 3 large"}
    assert not torch.equal(model.model.multi_modal_projector.linear_1.weight, before)
    whiten(model, BACKBONE.images(processor)([photograph(0)])["pixel_values"])


@pytest.mark.slow
def test_a_seed_of_it_trains_and_its_checkpoints_answer(photograph_folder, tmp_path):
    preset = dataclasses.replace(
        PRESET, images=60, questions=20, encoder_steps=3, localise_steps=3, answer_steps=3, steps=3, sizes=SIZES
    )
    make_start(tmp_path, 0, preset, [photograph_folder], print)
    for system in ("llava", "flexattn"):
        run_system(tmp_path, 0, system, preset, print)
    outcomes = {system: Outcome.read(tmp_path / f"{system}.json") for system in ("llava", "flexattn")}
    assert outcomes["llava"].selected is None and outcomes["flexattn"].selected.share > 0
    answers = {system: outcome.answers for system, outcome in outcomes.items()}
    Examples(tmp_path, 0, [photograph_folder], answers, BACKBONE).draw(tmp_path / "examples", [0, 3])
    assert {path.name for path in (tmp_path / "examples").iterdir()} == {"0000.png", "0003.png"}
    model, processor = load(tmp_path / "flexattn", "cpu")
    assert model.flexattn_settings.zoom == 3 and model.flexattn_settings.pool == 0
    answering.ask(model, processor, photograph(0), "Is there a boat?", 3)
