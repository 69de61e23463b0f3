"""The command line as a user meets it: what is printed where, what is written, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
import torch
from PIL import Image

import flexattn_cuda
from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaConfig
from flexattn_cuda.analysis import overlay as viz
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks.load import load

QUESTION = "Which digits stand on the red sign?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint.save(tmp_path_factory.mktemp("model")))


@pytest.fixture
def image(tmp_path):
    values = np.random.default_rng(3).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    Image.fromarray(values).resize((160, 120)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


# ----------------------------------------------------------------------------------------------------------------- ask


def test_ask_prints_the_answer_alone_on_stdout(flexattn, checkpoint, image):
    code, out, err = flexattn("ask", image, QUESTION, "--model", checkpoint, "--max-new-tokens", 5, "--device", "cpu")
    expected = answering.ask(*load(checkpoint, "cpu"), image, QUESTION, max_new_tokens=5).text
    assert (code, out.strip(), err) == (0, expected, "")


def test_ask_draws_a_map(flexattn, checkpoint, image, tmp_path):
    overlay = tmp_path / "map.png"
    code, out, err = flexattn("ask", image, QUESTION, "--model", checkpoint, "--max-new-tokens", 3, "--map", overlay)
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
    [
        (["--map-tokens", "all"], 3),
        (["--map-layers", "all"], 4),
        (["--map-tokens", "0,2", "--map-layers", "1,4"], 4),
    ],
)
def test_ask_draws_a_panel_for_each_token_and_layer(
    flexattn, checkpoint, image, tmp_path, monkeypatch, options, panels
):
    drawn = []
    monkeypatch.setattr(viz, "sheet", lambda image, panels, title: drawn.append(panels) or image)
    ends = ("--model", checkpoint, "--max-new-tokens", 3, "--map", tmp_path / "map.png")
    assert flexattn("ask", image, QUESTION, *ends, *options)[0] == 0
    assert len(drawn[0]) == panels and len({panel.caption for panel in drawn[0]}) == panels


# ---------------------------------------------------------------------------------------------------------- bad input


def refused(result: tuple[int, str, str]) -> str:
    """The sentence on stderr, after it was checked that there is nothing but a sentence."""
    code, out, err = result
    assert code == 2 and out == "" and err.startswith("flexattn: ") and err.count("\n") == 1, result
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.png", QUESTION], "there is no image nowhere.png"),
        ([".", QUESTION], "is not an image file"),
        (["empty.png", QUESTION], "is an empty file"),
        (["text.png", QUESTION], "is not an image that can be read"),
        (["cut.png", QUESTION], "is damaged"),
        (["image.png", ""], "the question is empty"),
        (["image.png", "what is <image>?"], "contains <image>"),
        (["image.png", QUESTION, "--max-new-tokens", "0"], "must be at least 1"),
        (["image.png", QUESTION, "--device", "tpu"], "allowed: auto, cpu, cuda"),
        (["image.png", QUESTION, "--dtype", "int8"], "allowed: auto, float32"),
        (["image.png", QUESTION, "--model", "nowhere"], "no checkpoint 'nowhere'"),
        (["image.png", QUESTION, "--model", "image.png"], "is a file"),
        (["image.png", QUESTION, "--model", "."], "has no config.json"),
        (["image.png", QUESTION, "--map", "no/folder/map.png"], "there is no folder"),
        (["image.png", QUESTION, "--map", "map"], "no ending of an image file"),
        (["image.png", QUESTION, "--map", "./image.png"], "would overwrite the image"),
        (["image.png", QUESTION, "--map-tokens", "last"], "allowed: first, all, or numbers"),
        (["image.png", QUESTION, "--map-layers", "-3"], "allowed: first, all, or numbers"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(flexattn, image, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "image.png").read_bytes()[:300])
    assert says in refused(flexattn("ask", *arguments))


def test_cuda_without_cuda_says_why(flexattn, image, monkeypatch):
    monkeypatch.setattr("flexattn_cuda.build.cuda_unavailable_reason", lambda *_: "no GPU is seen")
    assert "'cuda' cannot be used: no GPU is seen" in refused(flexattn("ask", image, QUESTION, "--device", "cuda"))


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_map_that_may_not_be_written(flexattn, image, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "permission denied" in refused(flexattn("ask", image, QUESTION, "--map", tmp_path / "locked" / "map.png"))


def test_a_map_is_refused_before_the_model_is_loaded(flexattn, image, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded"))
    assert "it is a folder" in refused(flexattn("ask", image, QUESTION, "--map", make_folder(tmp_path / "map.png")))


def make_folder(path):
    path.mkdir()
    return path


def test_layers_that_do_not_select(flexattn, checkpoint, image, tmp_path):
    said = refused(
        flexattn(
            "ask",
            image,
            QUESTION,
            "--model",
            checkpoint,
            "--map",
            tmp_path / "m.png",
            "--map-layers",
            "0",
        )
    )
    assert "the layers of this model that select are 1 to 4" in said


def test_tokens_that_the_answer_does_not_have(flexattn, checkpoint, image, tmp_path):
    options = (
        "--model",
        checkpoint,
        "--max-new-tokens",
        2,
        "--map",
        tmp_path / "m.png",
        "--map-tokens",
        "2",
    )
    code, _, err = flexattn("ask", image, QUESTION, *options)
    assert code == 2 and "there are tokens 0 to 1" in err


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_type": "bert"}, "type 'bert'"),
        (
            {"model_type": "llava_llama", "mm_vision_tower": "t", "extra": {"threshold": "many"}},
            "threshold = 'many'",
        ),
        ({"model_type": "llava_llama", "mm_vision_tower": "t", "extra": "none"}, "'extra'"),
        ({"flexattn_config": {"first_layer": 99}}, "first_layer is 99"),
    ],
)
def test_checkpoints_that_cannot_be_used(flexattn, image, tmp_path, changes, says):
    folder = tmp_path / "model"
    config = tiny_checkpoint.config()
    config.save_pretrained(folder)
    config.vision_config.save_pretrained(folder / "t")
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    assert says in refused(flexattn("ask", image, QUESTION, "--model", folder))
    assert says in refused(flexattn("info", "--model", folder))


def test_a_gpu_that_is_too_small(flexattn, image, monkeypatch):
    def load(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "load", load)
    assert "the GPU's memory is too small" in refused(flexattn("ask", image, QUESTION))


# ---------------------------------------------------------------------------------------------------------------- info


def test_info_tells_versions_build_and_paths(flexattn, monkeypatch):
    monkeypatch.setattr("flexattn_cuda.build.cuda_unavailable_reason", lambda *_: "no GPU is seen")
    code, out, _ = flexattn("info")
    assert code == 0
    for fact in (flexattn_cuda.__version__, torch.__version__, "transformers", "no GPU is seen"):
        assert fact in out


def test_info_estimates_the_memory_of_a_model(flexattn, tmp_path):
    config = FlexAttnLlavaConfig(flexattn_config=FlexAttnConfig().to_dict())  # 7B; there are no weights to load
    config.save_pretrained(tmp_path)
    code, out, _ = flexattn("info", "--model", tmp_path)
    assert code == 0
    for line in (
        "HR projections",
        "sequence cache",
        "HR cache, 43%",
        "HR cache, all",
        "barely enough",
        "not enough",
    ):
        assert line in out


# ---------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture
def examples(tmp_path, image, checkpoint):
    answer = answering.ask(*load(checkpoint), image, QUESTION, max_new_tokens=3).text
    folder = tmp_path / "examples"
    (folder / "photographs").mkdir(parents=True)
    os.rename(image, folder / "photographs" / "image.png")
    question = {
        "file": "photographs/image.png",
        "question": QUESTION,
        "answer": answer,
        "box": [0, 0, 9, 9],
    }
    (folder / "questions.json").write_text(json.dumps([question]))
    return folder


def test_demo_answers_and_writes_overlays(flexattn, checkpoint, examples, tmp_path):
    code, out, _ = flexattn(
        "demo",
        "--examples",
        examples,
        "--model",
        checkpoint,
        "--output",
        tmp_path / "out",
        "--max-new-tokens",
        3,
    )
    assert code == 0 and "1 of 1 answers are right" in out and QUESTION in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["01_image.png"]


def test_demo_fails_when_an_answer_is_wrong(flexattn, checkpoint, examples, tmp_path):
    questions = json.loads((examples / "questions.json").read_text())
    (examples / "questions.json").write_text(json.dumps([questions[0] | {"answer": "something else"}]))
    code, out, _ = flexattn(
        "demo",
        "--examples",
        examples,
        "--model",
        checkpoint,
        "--output",
        tmp_path / "out",
        "--max-new-tokens",
        3,
    )
    assert code == 1 and "WRONG, expected something else" in out and "0 of 1" in out


@pytest.mark.parametrize("content", [None, "{", "[]", '[{"file": "a.png"}]', "3", '{"a": 1}'])
def test_demo_without_examples(flexattn, tmp_path, content):
    if content is not None:
        (tmp_path / "questions.json").write_text(content)
    refused(flexattn("demo", "--examples", tmp_path, "--output", tmp_path / "out"))


def test_version(flexattn):
    assert flexattn("--version") == (0, f"flexattn {flexattn_cuda.__version__}\n", "")


@pytest.mark.slow
def test_wrong_usage_from_a_shell():
    wrong = subprocess.run([sys.executable, "-m", "flexattn_cuda.cli", "ask"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert "question" in wrong.stderr or "image" in wrong.stderr
    assert "Traceback" not in wrong.stderr


# --------------------------------------------------------------------------------------------------- the default model

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("example", QUESTIONS, ids=[example["file"] for example in QUESTIONS])
def test_the_default_model_answers_and_marks_the_region_of_the_answer(flexattn, tmp_path, example):
    code, out, _ = flexattn("ask", EXAMPLES / example["file"], example["question"], "--map", tmp_path / "map.png")
    assert code == 0 and out.strip() == example["answer"]

    image = np.asarray(open_image(EXAMPLES / example["file"])).astype(float)
    height, width = image.shape[:2]
    drawn = np.asarray(Image.open(tmp_path / "map.png")).astype(float)[:height, :width]
    marked = np.abs(drawn - viz.DIMMED * image).max(-1) > 40  # neither merely dimmed nor faintly tinted
    left, top, right, bottom = (round(x) for x in example["box"])
    assert marked[top:bottom, left:right].mean() > 0.7, "the sign is not marked"
    assert marked.mean() < 0.4, "as good as everything is marked"


@pytest.mark.slow
def test_demo_succeeds(flexattn, tmp_path):
    code, out, _ = flexattn("demo", "--examples", EXAMPLES, "--output", tmp_path)
    assert code == 0 and f"{len(QUESTIONS)} of {len(QUESTIONS)} answers are right" in out
    assert len(list(tmp_path.glob("*.png"))) == len(QUESTIONS)
