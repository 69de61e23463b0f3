"""The shared stages of the study: token labels, encoded scenes, batches, and the map that is supervised."""

import copy
import dataclasses
import random
from collections import Counter

import pytest
import torch
from small_study import photograph

from flexattn_cuda import Trace
from flexattn_cuda.families.llava.vision import encode_images
from flexattn_cuda.mechanism import attention
from flexattn_cuda.mechanism.config import FlexAttnConfig, settings_of
from flexattn_cuda.tasks.training_data import IGNORED
from studies.small import low_resolution_stage
from studies.small.attention_maps import causal_visibility, record_maps
from studies.small.batches import cells_of, pack_scenes, question_batch
from studies.small.encoded_scenes import Pick, encode_scenes, resolutions_of
from studies.small.encoder_data import EncoderData
from studies.small.encoder_stage import train_encoder, whiten
from studies.small.low_resolution_stage import LowResolutionModel, masked_attention, train_low_resolution
from studies.small.objects import Box, Glyph, Sign
from studies.small.optimizer import MuonAndAdamW, one_cycle
from studies.small.painter import Painter
from studies.small.presets import PRESETS, settings_for
from studies.small.questions import TASKS, vocabulary
from studies.small.scenes import make_scenes
from studies.small.small_model import ModelSizes, build_model, build_processor
from studies.small.token_labels import CLASSES, UNSURE, TokenLabels

SIZES = ModelSizes(vision_layers=1, layers=3)
FLEXATTN = settings_for("flexattn", SIZES)


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    settings = FLEXATTN
    processor = build_processor(vocabulary(), settings, SIZES)
    return build_model(processor, settings, SIZES), processor


@pytest.fixture(scope="module")
def encoded(built):
    model, processor = built
    resolutions = resolutions_of([None, FLEXATTN, settings_of("hd", SIZES.lowres)])
    return encode_scenes(model, processor, make_scenes([photograph(0)], 60, seed=0), 60, resolutions)


def test_a_token_has_the_class_of_what_covers_it():
    labels = TokenLabels(4, 8, CLASSES)
    glyphs = (Glyph("7", Box(8, 8, 16, 16)), Glyph("star", Box(16, 8, 24, 16)))
    labels.add_sign(Sign("green", glyphs, Box(6, 6, 26, 18)))
    names = {name: [*classes, None] for name, classes in CLASSES.items()}
    value = {name: labels.labels[name][1, 1:3] for name in CLASSES}
    assert [names["glyph"][v] for v in value["glyph"]] == ["7", "star"]
    assert [names["position"][v] for v in value["position"]] == ["first", "second"]
    assert [names["colour"][v] for v in value["colour"]] == ["green"] * 2
    assert labels.labels["colour"][0, 0] == UNSURE  # a corner of 4 pixels
    assert labels.labels["glyph"][0, 0] == len(CLASSES["glyph"])
    assert (labels.labels["vehicle"] == len(CLASSES["vehicle"])).all()


@pytest.mark.parametrize("box", [(8, 8, 12, 12), (28, 8, 37, 17)], ids=["too small", "cut by the edge"])
def test_what_cannot_be_read_has_no_label(box):
    labels = TokenLabels(4, 8, CLASSES)
    labels.add_sign(Sign("red", (Glyph("star", Box(*box)),), Box(4, 4, 32, 20)))
    glyphs = labels.labels["glyph"]
    assert (glyphs == UNSURE).any()
    assert set(glyphs.flatten()) == {UNSURE, len(CLASSES["glyph"])}


def test_cells_of_boxes_are_those_that_they_touch():
    touched = cells_of([Box(10, 0, 30, 10), Box(370, 370, 384, 384)], side=12).view(12, 12)
    assert touched.nonzero().tolist() == [[0, 0], [11, 11]]


def test_resolutions_are_listed_once():
    assert resolutions_of([None, FLEXATTN, settings_for("center", SIZES), settings_for("flexattn-zoom2", SIZES)]) == [
        (2, 192),
        (3, 288),
    ]


@pytest.mark.slow
def test_features_are_those_of_the_model_on_the_image(built, encoded):
    model, processor = built
    scene = next(make_scenes([photograph(0)], 1, seed=0))
    pixels = processor.image_processor([scene.image])
    with torch.no_grad():
        low, high = model.encode(pixels["pixel_values"], pixels["pixel_values_hr"])
    assert torch.equal(encoded.low[0], low[0].half())
    assert torch.equal(encoded.high[3, 288][0], high[0].half())
    assert encoded.scenes[0] == scene.without_image()


@pytest.mark.parametrize("settings", [None, FLEXATTN, settings_of("hd", SIZES.lowres)], ids=["low", "flexattn", "hd"])
def test_labels_are_the_answers_at_the_end_of_the_prompt(built, encoded, settings):
    _, processor = built
    batch = question_batch(encoded, encoded.asked(), processor, settings)
    for row, scene in enumerate(encoded.scenes):
        words = processor.tokenizer.convert_ids_to_tokens(batch["labels"][row][batch["labels"][row] != IGNORED])
        assert tuple(words) == (*scene.asked.answer, "</s>")
    labelled = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    tokens = 144 + (256 if settings and settings.system == "hd" else 0)
    assert ((batch["input_ids"] == processor.image_token_id).sum(1) == tokens).all()
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == processor.tokenizer.pad_token_id)
    prompts = question_batch(encoded, encoded.asked(), processor, settings, answers=False)
    assert "labels" not in prompts
    assert (prompts["input_ids"][:, -1] != processor.tokenizer.eos_token_id).all()


def test_training_draws_every_task_and_its_images_alike(encoded):
    """Within four standard deviations of the draws."""
    picks = encoded.sample(random.Random(0), 4000)
    tasks = Counter(question.task for _, question in picks)
    assert set(tasks) == set(TASKS) and all(
        abs(count - 800) < 4 * (4000 * 0.2 * 0.8) ** 0.5 for count in tasks.values()
    )
    numbers = Counter(number for number, question in picks if question.task == "comparison")
    wanted = [
        number
        for number, scene in enumerate(encoded.scenes)
        if "comparison" in {question.task for question in scene.questions}
    ]
    share = 1 / len(wanted)
    assert set(numbers) == set(wanted)
    assert all(abs(count - 800 * share) < 4 * (800 * share * (1 - share)) ** 0.5 for count in numbers.values())
    assert all(question in encoded.scenes[number].questions for number, question in picks)


@pytest.mark.parametrize("system", ["llava", "hd", "xattn"])
def test_images_and_their_features_are_answered_alike(system):
    """Within the rounding of the features to half: 2^-11 of values of a few units, through a few layers."""
    settings = settings_of(system, SIZES.lowres)
    processor = build_processor(vocabulary(), settings, SIZES)
    torch.manual_seed(0)
    model = build_model(processor, settings, SIZES)
    own = encode_scenes(model, processor, make_scenes([photograph(0)], 1, seed=0), 1, resolutions_of([settings]))
    scene = next(make_scenes([photograph(0)], 1, seed=0))
    inputs = processor(images=scene.image, text=processor.prompt(scene.asked.text))
    features = question_batch(own, own.asked(), processor, settings, answers=False)
    assert torch.equal(features["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**features).logits, model(**inputs).logits, atol=2e-2, rtol=0)


@pytest.fixture(scope="module")
def plain():
    """A LLaVA without high resolution."""
    torch.manual_seed(0)
    return build_model(build_processor(vocabulary(), None, SIZES), None, SIZES)


def test_packed_questions_are_answered_as_alone(plain, built, encoded):
    processor = built[1]
    numbers = [0, 3, 5]
    picks = [Pick(number, question) for number in numbers for question in encoded.scenes[number].questions]
    with torch.no_grad():
        with masked_attention(plain), record_maps(plain, range(SIZES.first_layer - 1, SIZES.layers)) as maps:
            packed = LowResolutionModel(plain, processor, maps).predict(encoded, numbers, SIZES.layers)
        # One question a batch, so that none is padded.
        alone = [question_batch(encoded, [pick], processor, None) for pick in picks]
        predicting = [batch["labels"].roll(-1, 1) != IGNORED for batch in alone]
        logits = [plain(**batch, use_cache=False).logits[rows] for batch, rows in zip(alone, predicting)]
    torch.testing.assert_close(packed.logits, torch.cat(logits), atol=1e-5, rtol=1e-4)
    labels = [batch["labels"][batch["labels"] != IGNORED] for batch in alone]
    assert torch.equal(packed.labels, torch.cat(labels))
    looks = [boxes for pick in picks for boxes in (*pick.question.looks, pick.question.boxes)]
    assert torch.equal(packed.cells.bool(), torch.stack([cells_of(boxes, SIZES.lr_side) for boxes in looks]))
    boxes = [pick.question.boxes for pick in picks for _ in range(len(pick.question.looks) + 1)]
    assert torch.equal(packed.answer_cells.bool(), torch.stack([cells_of(one, SIZES.lr_side) for one in boxes]))
    assert packed.maps.shape == (SIZES.layers - SIZES.first_layer + 1, len(looks), SIZES.lr_side**2)


def test_packed_rows_are_padded_on_the_right(built, encoded):
    """Padding is seen by no question and predicts nothing."""
    processor = built[1]
    packed = pack_scenes(encoded, [0, 3], processor)
    padding = packed.input_ids == processor.tokenizer.pad_token_id
    assert padding.any() and not (padding[:, :-1] & ~padding[:, 1:]).any()
    assert not (packed.visible[:, 0] & ~padding[:, :, None] & padding[:, None]).any()
    assert (packed.labels[padding] == IGNORED).all() and not packed.cells[padding].any()


def test_the_first_layers_alone_give_the_same_first_map(plain, built, encoded):
    """The localise stage runs no layer that its map does not need."""
    with torch.no_grad(), masked_attention(plain), record_maps(plain, range(1, SIZES.layers)) as maps:
        low = LowResolutionModel(plain, built[1], maps)
        first, every = (low.predict(encoded, [0, 1], layers) for layers in (2, SIZES.layers))
    assert len(first.maps) == 1 and len(every.maps) == 2
    assert torch.equal(first.maps[0], every.maps[0])
    assert not torch.equal(first.logits, every.logits)


def test_the_supervised_map_is_the_one_that_selects(built, encoded):
    """The operator's map, which is the sum over heads, of every answer row."""
    model, processor = built
    picks = [pick for pick in encoded.asked() if pick.question.task == "text"]
    inputs = question_batch(encoded, picks, processor, FLEXATTN)
    trace, selecting = Trace(), SIZES.first_layer - 1
    assert inputs["attention_mask"].all()  # questions of one length: nothing is padded
    with torch.no_grad(), record_maps(model, [selecting]) as (recorded,):
        model(**inputs, use_cache=False, flexattn_trace=trace)
        before_answer = inputs["labels"].roll(-1, 1) != IGNORED
        maps = recorded.map(causal_visibility(inputs["attention_mask"]), before_answer)
    start = inputs["input_ids"][0].tolist().index(processor.image_token_id)
    expected = trace.steps[0][selecting].map[:, :, 0]
    maps = maps.view(len(picks), 3, -1)[..., start : start + 144]
    torch.testing.assert_close(maps * SIZES.heads, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_the_low_resolution_stages_learn_and_leave_the_encoder(plain, built, encoded, monkeypatch):
    model, processor = copy.deepcopy(plain), built[1]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    losses = {"localise": [], "answer": []}
    train_stage = low_resolution_stage.train_stage

    def recorded(stage, steps):
        loss = stage.loss
        stage.loss = lambda step: losses[stage.name].append(loss(step)) or losses[stage.name][-1]
        train_stage(stage, steps)

    monkeypatch.setattr(low_resolution_stage, "train_stage", recorded)
    preset = dataclasses.replace(PRESETS["tiny"], localise_steps=6, answer_steps=4, sizes=SIZES)
    found = train_low_resolution(model, processor, encoded, encoded, preset)
    assert [len(of_stage) for of_stage in losses.values()] == [6, 4]
    assert all(of_stage[-1] < of_stage[0] for of_stage in losses.values())
    assert all(0 <= value <= 1 for row in found.values() for value in row.values())
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all("language_model" in name or "lm_head" in name for name in changed)
    assert len(model.model.language_model.layers) == SIZES.layers
    assert model.model.language_model.config._attn_implementation == attention.NAME
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.language_model.layers)


def test_whitening_leaves_no_direction_that_varies_much_more_than_another(built):
    """Variances v along the principal directions become v / (v + 1 % of their mean)."""
    model, processor = copy.deepcopy(built[0]), built[1]
    data = EncoderData(Painter([photograph(0)], None, random.Random(0)), processor.image_processor, SIZES.cell)
    pixels, labels = data.batch(12)
    assert pixels.shape == (12, 3, 96, 96) and [part.shape for part in labels] == [(12, 144)] * len(CLASSES)
    small, labels = data.hd_batch(2)
    assert small.shape == (2, 3, 64, 64) and [part.shape for part in labels] == [(2, 64)] * len(CLASSES)

    def tokens():
        with torch.no_grad():
            return encode_images(model.model, pixels).flatten(0, 1)

    before = torch.linalg.eigvalsh(torch.cov(tokens().T))
    whiten(model, pixels)
    after = torch.linalg.eigvalsh(torch.cov(tokens().T))
    assert tokens().mean(0).abs().max() < 1e-3
    torch.testing.assert_close(after, before / (before + 0.01 * before.mean()), atol=1e-3, rtol=1e-2)


@pytest.mark.slow
def test_the_encoder_stage_reports_every_resolution_and_freezes_the_encoder(built):
    model, processor = copy.deepcopy(built[0]), built[1]
    before = model.model.multi_modal_projector.linear_1.weight.clone()
    preset = dataclasses.replace(PRESETS["tiny"], encoder_steps=3, sizes=SIZES)
    right = train_encoder(model, processor, [photograph(0)], [photograph(1)], preset, batch=2)
    tiles = (f"zoom {zoom} {size}" for zoom in (2, 3, 4) for size in ("small", "large"))
    assert set(right) == {"low", "hd", *tiles}
    assert set(right["zoom 3 small"]) == set(CLASSES)
    assert not torch.equal(model.model.multi_modal_projector.linear_1.weight, before)
    assert not any(p.requires_grad for p in model.model.vision_tower.parameters())


def test_zoom_sets_the_high_resolution():
    assert settings_for("flexattn-zoom4", SIZES) == FlexAttnConfig(
        zoom=4, lowres_size=96, highres_size=384, first_layer=2, pool=0, warmup=None
    )


def test_the_optimizer_resumes_from_its_state():
    """Six steps equal three, and three more by an optimizer with the state of the first, in weights and rates."""
    torch.manual_seed(0)
    inputs = torch.randn(6, 8, 4)
    start = torch.nn.ModuleDict({"between": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)})

    def steps(model, optimizer, schedule, batches):
        for batch in batches:
            optimizer.zero_grad()
            model["head"](model["between"](batch).tanh()).square().mean().backward()
            optimizer.step()
            schedule.step()
        return [group["lr"] for group in optimizer.param_groups]

    def made(model):
        optimizer = MuonAndAdamW(dict(model.named_parameters()), 1e-2)
        return model, optimizer, one_cycle(optimizer, 7)

    once, halved = made(copy.deepcopy(start)), made(copy.deepcopy(start))
    rates = steps(*once, inputs)
    steps(*halved, inputs[:3])
    again = made(halved[0])
    for part, earlier in zip(again[1:], halved[1:]):
        part.load_state_dict(earlier.state_dict())
    assert steps(*again, inputs[3:]) == rates and rates[0] < 1e-2 and rates[1] < 2e-3
    for name, weight in once[0].state_dict().items():
        assert torch.equal(weight, again[0].state_dict()[name]), name
        assert not torch.equal(weight, start.state_dict()[name]), name
