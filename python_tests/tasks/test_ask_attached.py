"""Asking models that FlexAttention was attached to: in Python, from the command line, in batches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import question_files
import torch
from attached_checkpoint import CHECKPOINTS
from refusals import refused
from transformers import AutoModelForImageTextToText, pipeline

import flexattn_cuda
from flexattn_cuda import Trace
from flexattn_cuda.analysis import overlay as viz
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.family import FixedTower
from flexattn_cuda.inputs.image_families import ImageFamily
from flexattn_cuda.tasks.ask import ask, generate_answers
from flexattn_cuda.tasks.load import load

QUESTION = "what is this"
checkpoints = pytest.mark.parametrize("name", CHECKPOINTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoint folders by name, saved when they are first asked for; no test changes them."""
    saved = {}

    def folder(name):
        if name not in saved:
            saved[name] = CHECKPOINTS[name].save(tmp_path_factory.mktemp(name))
        return saved[name]

    return folder


def attached(folder):
    """Return model and processor as a user makes them."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    flexattn_cuda.attach(model)
    return model, flexattn_cuda.processor_for(model)


@checkpoints
def test_the_answer_is_what_generate_gives(folders, name):
    model, processor = attached(folders(name))
    heard: list[str] = []
    answer = ask(model, processor, question_files.image(), QUESTION, max_new_tokens=5, on_text=heard.append)
    inputs = processor(images=question_files.image(), text=processor.prompt(QUESTION))
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "pixel_values_hr" in inputs and answer.tokens == ids.tolist()
    assert "".join(heard).strip() == answer.text == processor.decode(ids, skip_special_tokens=True).strip()


@checkpoints
def test_a_map_is_drawn_over_what_the_view_shows(folders, name):
    model, processor = attached(folders(name))
    answer = ask(model, processor, question_files.image(), QUESTION, max_new_tokens=2, trace=True)
    traced = answer.trace.steps[0][min(answer.trace.steps[0])]
    attention, mask = (part.numpy() for part in traced.of_image(row=0, query=-1, image=0))
    expected = viz.overlay(answer.image, attention, mask, processor.frame)
    assert np.array_equal(np.asarray(answer.draw())[:120, :160], np.asarray(expected))
    rows, columns = viz.cells_of_pixels(160, 120, mask.shape, processor.frame)
    cropped = name in ("llava", "vipllava")  # CLIP's image processor crops to the central square
    assert (columns >= 0).sum() == (120 if cropped else 160) and (rows >= 0).all()


@checkpoints
def test_a_batch_is_answered_as_its_questions_alone(folders, name):
    model, processor = attached(folders(name))
    images = [question_files.image(*size, seed=seed) for seed, size in enumerate([(160, 120), (60, 150), (96, 96)])]
    questions = ["what", "what is this", "is this what"]
    alone = [ask(model, processor, image, question, 4).tokens for image, question in zip(images, questions)]
    assert generate_answers(model, processor, [[image] for image in images], questions, 4) == alone


@checkpoints
@torch.no_grad()
def test_prompts_of_a_batch_may_have_different_numbers_of_images(folders, name):
    model, processor = attached(folders(name))
    images = [[question_files.image(seed=0), question_files.image(96, 96, seed=1)], [question_files.image(seed=2)]]
    texts = [processor.prompt(QUESTION, images=len(some)) for some in images]
    logits = model(**processor(images=images, text=texts)).logits
    for row, (some, text) in enumerate(zip(images, texts)):
        alone = model(**processor(images=some, text=text)).logits[0]
        assert (logits[row, -len(alone) :] - alone).abs().max() <= 1e-4 * alone.abs().max()


def test_any_of_several_end_tokens_ends_an_answer(folders):
    model, processor = attached(folders("internvl_qwen2"))
    tokens = ask(model, processor, question_files.image(), QUESTION, max_new_tokens=6).tokens
    last = next(token for token in tokens if token != tokens[0])
    model.generation_config.eos_token_id = [99, last]
    ended = ask(model, processor, question_files.image(), QUESTION, max_new_tokens=6)
    assert ended.tokens == tokens[: tokens.index(last)]


def test_a_tokenizer_without_a_padding_token_can_be_asked(folders):
    model, processor = attached(folders("internvl_qwen2"))
    expected = ask(model, processor, question_files.image(), QUESTION, 3).tokens
    processor.tokenizer.pad_token = None
    assert ask(model, processor, question_files.image(), QUESTION, 3).tokens == expected


def test_a_model_without_flexattention_is_refused(folders):
    _, processor = attached(folders("internvl_qwen2"))
    plain = AutoModelForImageTextToText.from_pretrained(folders("internvl_qwen2"))
    with pytest.raises(InputError, match="InternVLForConditionalGeneration has no FlexAttention; call .*attach"):
        ask(plain, processor, question_files.image(), QUESTION)


@checkpoints
def test_the_pipeline_of_transformers_sees_hr_tokens(folders, name):
    model, processor = attached(folders(name))
    expected = ask(model, processor, question_files.image(), QUESTION, max_new_tokens=3)
    trace = Trace()
    options = dict(max_new_tokens=3, do_sample=False, flexattn_trace=trace)
    run = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": question_files.image()}, {"type": "text", "text": QUESTION}]
    [made] = run(text=[{"role": "user", "content": content}], generate_kwargs=options, return_full_text=False)
    assert made["generated_text"].strip() == expected.text
    assert any(traced.mask.any() for traced in trace.steps[0].values())


# ------------------------------------------------------------------------------------------------------- command line


def test_the_command_answers_and_draws(folders, flexattn, image, tmp_path):
    options = ("--model", folders("qwen2_5_vl"), "--max-new-tokens", 3, "--device", "cpu", "--map", tmp_path / "m.png")
    code, out, err = flexattn("ask", image, QUESTION, *options, "--map-layers", "all")
    expected = ask(*load(folders("qwen2_5_vl"), "cpu"), image, QUESTION, max_new_tokens=3).text
    assert code == 0 and out.strip() == expected and err == f"wrote {tmp_path / 'm.png'}\n"
    assert "that select are 0 to 4" in refused(flexattn("ask", image, QUESTION, *options, "--map-layers", "5"))


def test_the_command_takes_an_adapter(folders, flexattn, image, tmp_path):
    model, processor = attached(folders("internvl_qwen2"))
    with torch.no_grad():
        for parameter in model.model.language_model.layers[2].self_attn.v_proj_hd.parameters():
            parameter.neg_()
    flexattn_cuda.save_adapter(model, tmp_path / "adapter")
    expected = ask(model, processor, image, QUESTION, max_new_tokens=5).text
    options = ("--model", folders("internvl_qwen2"), "--max-new-tokens", 5, "--device", "cpu")
    code, out, _ = flexattn("ask", image, QUESTION, *options, "--adapter", tmp_path / "adapter")
    assert code == 0 and out.strip() == expected
    assert flexattn("ask", image, QUESTION, *options)[1].strip() != expected


def test_a_file_of_questions_is_answered(folders, flexattn, folder):
    records = [{"image": f"{number % 3}.png", "question": QUESTION} for number in range(4)]
    records.append({"image": "nowhere.png", "question": QUESTION})
    (folder / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    options = ("--model", folders("qwen2_vl"), "--max-new-tokens", 3, "--device", "cpu", "--batch-size", 2)
    code, _, err = flexattn("ask-batch", folder / "q.jsonl", "-o", folder / "a.jsonl", *options)
    assert code == 0, err
    answers = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    loaded = load(folders("qwen2_vl"), "cpu")
    for number, answer in enumerate(answers[:4]):
        assert answer["answer"] == ask(*loaded, folder / f"{number % 3}.png", QUESTION, max_new_tokens=3).text
    assert "there is no image" in answers[4]["error"]


@pytest.mark.parametrize(
    "options, says",
    [
        (("--quantize", "2bit"), "quantize is '2bit'; allowed: 4bit, 8bit"),
        (("--adapter", "nowhere"), "no adapter 'nowhere': it is neither a local folder nor a hub id"),
        (("--adapter", "."), "holds no flexattn_adapter.json"),
    ],
)
def test_options_that_cannot_be_used_are_refused(folders, flexattn, image, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    said = refused(flexattn("ask", image, QUESTION, "--model", folders("internvl_qwen2"), "--device", "cpu", *options))
    assert says in said


def test_an_adapter_of_this_package_s_own_model_is_refused(checkpoint, flexattn, image, tmp_path):
    said = refused(flexattn("ask", image, QUESTION, "--model", checkpoint, "--adapter", tmp_path))
    assert "is a checkpoint of this package, with HR projections of its own; leave out adapter" in said


# ------------------------------------------------------------------------------------------------ a family of one's own


class MyTower(FixedTower):
    """A family as the documentation describes one."""

    def encode(self, pixels):
        tokens = self.model.model.get_image_features(pixel_values=pixels.to(self.model.dtype))
        tokens = getattr(tokens, "pooler_output", tokens)
        return tokens if isinstance(tokens, torch.Tensor) else torch.stack(list(tokens))


def test_a_family_that_the_user_describes_can_be_asked(folders):
    expected = ask(*attached(folders("llava_siglip")), question_files.image(), QUESTION, max_new_tokens=4)
    model = AutoModelForImageTextToText.from_pretrained(folders("llava_siglip"))
    model.config.model_type = "my_vlm"
    flexattn_cuda.attach(model, family=MyTower)
    images = ImageFamily(token="<image>", cell=lambda config: config.vision_config.patch_size)
    processor = flexattn_cuda.processor_for(model, family=images)
    assert ask(model, processor, question_files.image(), QUESTION, max_new_tokens=4).tokens == expected.tokens
