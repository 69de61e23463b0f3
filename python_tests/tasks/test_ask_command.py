"""`flexattn ask`: what is printed, what is drawn, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
import torch
from PIL import Image
from question_files import EXAMPLES, QUESTION, SIGNS, some, write
from refusals import refused
from safetensors.torch import load_file, save_file

from flexattn_cuda.analysis import overlay as viz
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks.load import load


def test_ask_prints_the_answer_alone_on_stdout(flexattn, checkpoint, image):
    code, out, err = flexattn("ask", image, QUESTION, "--model", checkpoint, "--max-new-tokens", 5, "--device", "cpu")
    expected = answering.ask(*load(checkpoint, "cpu"), image, QUESTION, max_new_tokens=5).text
    assert (code, out.strip(), err) == (0, expected, "")


def test_ask_draws_a_map(flexattn, checkpoint, image, tmp_path):
    overlay = tmp_path / "map.png"
    code, _, err = flexattn("ask", image, QUESTION, "--model", checkpoint, "--max-new-tokens", 3, "--map", overlay)
    assert code == 0 and err == f"wrote {overlay}\n"
    answer = answering.ask(*load(checkpoint), image, QUESTION, max_new_tokens=3, trace=True)
    assert np.array_equal(np.asarray(Image.open(overlay)), np.asarray(answer.draw()))
    drawn = np.asarray(Image.open(overlay))[:120, :160].astype(int)
    mask = answer.trace.steps[0][1].mask[0, 0, 0].view(18, 18).cpu().numpy()
    rows, columns = viz.cells_of_pixels(160, 120, 18)
    selected = mask[rows[:, None], columns[None, :]]
    outlined = (drawn == viz.OUTLINE).all(-1)
    assert selected.any() and not selected.all() and outlined.any() and not (outlined & ~selected).any()


@pytest.mark.parametrize(
    "options, panels",
    [(["--map-tokens", "all"], 3), (["--map-layers", "all"], 4), (["--map-tokens", "0,2", "--map-layers", "1,4"], 4)],
)
def test_ask_draws_a_panel_for_each_token_and_layer(
    flexattn, checkpoint, image, tmp_path, monkeypatch, options, panels
):
    drawn = []
    monkeypatch.setattr(viz, "sheet", lambda image, panels, *rest: drawn.append(panels) or image)
    ends = ("--model", checkpoint, "--max-new-tokens", 3, "--map", tmp_path / "map.png")
    assert flexattn("ask", image, QUESTION, *ends, *options)[0] == 0
    assert len(drawn[0]) == panels and len({panel.caption for panel in drawn[0]}) == panels


def test_several_images_are_one_prompt(flexattn, checkpoint, image, folder):
    images = [folder / "1.png", folder / "2.png"]
    options = ("--model", checkpoint, "--max-new-tokens", 4, "--device", "cpu")
    code, out, err = flexattn("ask", *images, QUESTION, *options)
    expected = answering.ask(*load(checkpoint, "cpu"), images, QUESTION, max_new_tokens=4)
    assert (code, out.strip(), err) == (0, expected.text, "") and len(expected.images) == 2
    swapped = answering.ask(*load(checkpoint, "cpu"), images[::-1], QUESTION, max_new_tokens=4)
    assert swapped.tokens != expected.tokens


def test_json_tells_what_was_selected_of_every_image(flexattn, checkpoint, folder, tmp_path):
    images = [folder / "0.png", folder / "1.png"]
    options = ("--model", checkpoint, "--max-new-tokens", 3, "--device", "cpu", "--json")
    code, out, _ = flexattn("ask", *images, QUESTION, *options, "--map", tmp_path / "map.png")
    told = json.loads(out)
    answer = answering.ask(*load(checkpoint, "cpu"), images, QUESTION, max_new_tokens=3, trace=True)
    assert code == 0 and (told["answer"], told["tokens"]) == (answer.text, answer.pieces)
    assert [(one["image"], one["width"], one["height"]) for one in told["images"]] == [
        (str(images[0]), 160, 120),
        (str(images[1]), 120, 160),
    ]
    for number, one in enumerate(told["images"]):
        found = answer.selection(number)
        assert one["tiles"] == found.tiles and one["regions"] == [list(region) for region in found.regions]
        assert 0 < one["selected_share"] < 1
    assert np.array_equal(np.asarray(Image.open(tmp_path / "map.png")), np.asarray(answer.draw()))


def test_a_comparison_is_with_a_model_that_has_no_high_resolution(flexattn, checkpoint, image, tmp_path):
    options = ("--model", checkpoint, "--max-new-tokens", 4, "--device", "cpu", "--compare", "--json")
    code, out, _ = flexattn("ask", image, QUESTION, *options, "--map", tmp_path / "map.png")
    plain = answering.ask(*load(checkpoint, "cpu", system="llava"), image, QUESTION, max_new_tokens=4)
    told = json.loads(out)
    assert code == 0 and told["low_resolution_answer"] == plain.text != told["answer"]
    both, alone = (
        Image.open(tmp_path / "map.png"),
        answering.ask(*load(checkpoint, "cpu"), image, QUESTION, 4, trace=True),
    )
    right = np.asarray(both)[:, -alone.draw().width :][: alone.draw().height]
    assert np.array_equal(right, np.asarray(alone.draw()))
    code, out, _ = flexattn("ask", image, QUESTION, *options[:-1])
    assert out.splitlines() == [f"low resolution:  {plain.text}", f"high resolution: {told['answer']}"]


@pytest.mark.parametrize(
    "options, changed",
    [
        (["--threshold", "3"], dict(threshold=3.0)),
        (["--zoom", "2"], dict(zoom=2, highres_size=96)),
        (["--system", "center", "--zoom", "2"], dict(strategy="center", zoom=2, highres_size=96)),
    ],
)
def test_settings_can_be_tried_without_another_checkpoint(flexattn, checkpoint, image, monkeypatch, options, changed):
    used = []
    ask = answering.ask
    monkeypatch.setattr(
        answering, "ask", lambda model, *args, **kwargs: used.append(model) or ask(model, *args, **kwargs)
    )
    assert flexattn("ask", image, QUESTION, "--model", checkpoint, "--max-new-tokens", 2, *options)[0] == 0
    own = load(checkpoint, "cpu")[0].flexattn_settings
    assert used[0].flexattn_settings == dataclasses.replace(own, **changed) != own


class Stdin:
    """Standard input that holds some bytes, or is a terminal."""

    def __init__(self, data: bytes | None):
        self.buffer = io.BytesIO(data or b"")
        self.isatty = lambda: data is None


def test_a_dash_is_an_image_on_standard_input(flexattn, checkpoint, image, monkeypatch):
    options = (QUESTION, "--model", checkpoint, "--max-new-tokens", 5, "--device", "cpu")
    monkeypatch.setattr(sys, "stdin", Stdin(Path(image).read_bytes()))
    assert flexattn("ask", "-", *options) == flexattn("ask", image, *options)


@pytest.mark.parametrize(
    "data, says", [(None, "standard input is a terminal"), (b"", "not an image"), (b"\x89PNG\r\n", "not an image")]
)
def test_standard_input_without_an_image_is_refused(flexattn, monkeypatch, data, says):
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    assert says in refused(flexattn("ask", "-", QUESTION))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.png", QUESTION], "there is no image nowhere.png"),
        (["none", QUESTION], "the folder none holds no files that end in .png"),
        (["image.png", ".", QUESTION], ". is a folder, whose images are asked about one by one"),
        ([".", QUESTION, "--map", "map.png"], ". is a folder; --map and --compare take images"),
        ([".", QUESTION, "--compare"], ". is a folder; --map and --compare take images"),
        ([".", " "], "the question is empty"),
        ([".", QUESTION, "--batch-size", "0"], "must be at least 1"),
        (["empty.png", QUESTION], "is an empty file"),
        (["text.png", QUESTION], "is not an image that can be read"),
        (["cut.png", QUESTION], "is damaged"),
        (["", QUESTION], "the name of an image is empty"),
        (["-", "-", QUESTION], "standard input is named twice"),
        (["image.png", QUESTION, "--preset", "best"], "allowed: paper, released"),
        (["image.png", QUESTION, "--preset", "paper", "--system", "llava"], "exclude each other"),
        (["image.png", QUESTION, "--zoom", "2", "--adapter", "a"], "an adapter has settings of its own"),
        (["image.png", QUESTION, "--system", "llava", "--threshold", "9"], "without FlexAttention"),
        (["image.png", QUESTION, "--system", "hd", "--compare"], "leave --map and --compare out"),
        (["image.png", ""], "the question is empty"),
        (["image.png", "what is \udcff?"], "half of a surrogate pair"),
        (["image.png", "what is <image>?"], "contains <image>"),
        (["image.png", QUESTION, "--max-new-tokens", "0"], "must be at least 1"),
        (["image.png", QUESTION, "--device", "tpu"], "allowed: auto, cpu, cuda"),
        (["image.png", QUESTION, "--dtype", "int8"], "allowed: auto, float32"),
        (["image.png", QUESTION, "--model", "nowhere"], "no checkpoint 'nowhere'"),
        (["image.png", QUESTION, "--model", "image.png"], "is a file"),
        (["image.png", QUESTION, "--model", "."], "has no config.json"),
        (["image.png", QUESTION, "--model", ""], "the name of the checkpoint is empty"),
        (["image.png", QUESTION, "--map", ""], "map is empty"),
        (["image.png", QUESTION, "--map", "no/folder/map.png"], "there is no folder"),
        (["image.png", QUESTION, "--map", "map"], "does not have the extension of an image file"),
        (["image.png", QUESTION, "--map", "./image.png"], "would overwrite the image"),
        (["image.png", QUESTION, "--map-tokens", "last"], "allowed: first, all, or numbers"),
        (["image.png", QUESTION, "--map-layers", "-3"], "allowed: first, all, or numbers"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(flexattn, image, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "image.png").read_bytes()[:300])
    assert says in refused(flexattn("ask", *arguments))


def test_a_device_that_cannot_be_used_is_refused_with_the_reason(flexattn, image, monkeypatch):
    monkeypatch.setattr("flexattn_cuda.build.cuda_unavailable_reason", lambda *_: "no GPU is seen")
    assert "'cuda' cannot be used: no GPU is seen" in refused(flexattn("ask", image, QUESTION, "--device", "cuda"))


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_map_that_cannot_be_written_is_refused(flexattn, image, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "permission denied" in refused(flexattn("ask", image, QUESTION, "--map", tmp_path / "locked" / "map.png"))


def test_a_map_is_refused_before_the_model_is_loaded(flexattn, image, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "map.png").mkdir()
    assert "it is a folder" in refused(flexattn("ask", image, QUESTION, "--map", tmp_path / "map.png"))


def test_layers_that_do_not_select_are_refused(flexattn, checkpoint, image, tmp_path):
    said = refused(
        flexattn("ask", image, QUESTION, "--model", checkpoint, "--map", tmp_path / "m.png", "--map-layers", "0")
    )
    assert "the layers of this model that select are 1 to 4" in said


def test_tokens_that_the_answer_does_not_have_are_refused(flexattn, checkpoint, image, tmp_path):
    options = ("--model", checkpoint, "--max-new-tokens", 2, "--map", tmp_path / "m.png", "--map-tokens", "2")
    code, _, err = flexattn("ask", image, QUESTION, *options)  # the answer is printed before the map is drawn
    assert code == 2 and "there are tokens 0 to 1" in err


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_type": "bert"}, "type 'bert'"),
        ({"model_type": "llava_llama", "mm_vision_tower": "t", "extra": {"threshold": "many"}}, "threshold = 'many'"),
        ({"model_type": "llava_llama", "mm_vision_tower": "t", "extra": "none"}, "'extra'"),
        ({"flexattn_config": {"first_layer": 99}}, "first_layer is 99"),
    ],
)
def test_checkpoints_that_cannot_be_used_are_refused(flexattn, image, tmp_path, changes, says):
    folder = tmp_path / "model"
    config = tiny_checkpoint.config()
    config.save_pretrained(folder)
    config.vision_config.save_pretrained(folder / "t")
    tiny_checkpoint.edit_json(folder / "config.json", **changes)
    assert says in refused(flexattn("ask", image, QUESTION, "--model", folder))
    assert says in refused(flexattn("info", "--model", folder))


def test_a_checkpoint_whose_weights_are_not_numbers_ends_every_command(flexattn, checkpoint, folder, tmp_path):
    spoiled = shutil.copytree(checkpoint, tmp_path / "spoiled")
    weights = load_file(spoiled / "model.safetensors")
    next(weight for name, weight in weights.items() if name.endswith("lm_head.weight"))[3, 3] = float("nan")
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    questions = write(folder / "q.jsonl", some(2))
    for arguments in (["ask", folder / "0.png", "why"], ["ask-batch", questions, "-o", folder / "a.jsonl"]):
        assert "hold NaN or infinite numbers" in refused(flexattn(*arguments, "--model", spoiled))


def test_a_gpu_without_enough_memory_is_reported(flexattn, image, monkeypatch):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "load", load)
    assert "the GPU does not have enough memory" in refused(flexattn("ask", image, QUESTION))


@pytest.mark.slow
@pytest.mark.parametrize("example", SIGNS, ids=[example["file"] for example in SIGNS])
def test_the_default_model_answers_and_marks_the_region_of_the_answer(flexattn, tmp_path, example):
    file = EXAMPLES / example["file"]
    code, out, _ = flexattn("ask", file, example["question"], "--json", "--map", tmp_path / "map.png")
    told = json.loads(out)
    assert code == 0 and told["answer"] == example["answer"]

    image = np.asarray(open_image(file)).astype(float)
    height, width = image.shape[:2]
    drawn = np.asarray(Image.open(tmp_path / "map.png")).astype(float)[:height, :width]
    marked = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in told["images"][0]["regions"]:
        marked[top:bottom, left:right] = True
    left, top, right, bottom = (round(x) for x in example["box"])
    assert marked[top:bottom, left:right].mean() > 0.5, "the sign is not marked"  # cells are as large as signs
    assert marked.mean() < 0.4, "as good as everything is marked"
    brightened = np.clip(viz.BRIGHTENED * image, 0, 255)  # what the first token selects, which is a part of it
    near = np.abs(drawn - brightened).max(-1) <= np.abs(drawn - viz.DIMMED * image).max(-1)
    assert near[top:bottom, left:right].mean() > 0.3, "the sign is dimmed"
