"""`train --adapter-only`: adapters for models of other families, trained on the same records by the same run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import question_files
import tiny_families
import torch
import transformers
from attached_checkpoint import CHECKPOINTS
from refusals import refused
from safetensors.torch import load_file
from train_runs import command, environment, furthest
from training_data import record, train_on
from transformers import AutoTokenizer, TrainingArguments

import flexattn_cuda
from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.tasks import training_data as data
from flexattn_cuda.tasks.ask import ask
from flexattn_cuda.tasks.load import load, load_attached
from flexattn_cuda.tasks.options import TrainOptions
from flexattn_cuda.tasks.train import FlexAttnTrainer
from flexattn_cuda.tasks.training_data import BrokenRecordError, Collator, Conversation, Conversations, Turn

ADAPTER = {"flexattn_adapter.json", "flexattn_adapter.safetensors", "README.md"}
RUN: dict[str, Any] = dict(adapter_only=True, steps=6, batch_size=2, learning_rate=3e-2, device="cpu", save_every=2)
FAMILIES = ("internvl_qwen2", "qwen2_5_vl")

families = pytest.mark.parametrize("name", FAMILIES)

# Ends every answer with the token that ends a sequence, as the templates of most families do.
TEMPLATE = (
    "{%% for message in messages %%}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{%% for part in message['content'] %%}{{ '%s ' if part['type'] == 'image' else part['text'] }}{%% endfor %%}"
    "{{ ' </s> ' if message['role'] == 'assistant' else ' ' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ 'ASSISTANT: ' }}{%% endif %%}"
)
# Drops earlier answers, as templates do that leave out what a model thought.
FORGETFUL = TEMPLATE.replace(
    "part['text'] }}", "part['text'] if message == messages[-1] or message['role'] == 'user' else '' }}"
)


def save(folder: Path, name: str, template: str = TEMPLATE) -> Path:
    """Save a tiny checkpoint whose chat template renders conversations, and whose HR tokens matter."""
    CHECKPOINTS[name].save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template % CHECKPOINTS[name].mark
    tokenizer.save_pretrained(folder)
    model = tiny_families.FAMILIES[name].model()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    # Maps of tiny random models are flat: a threshold that they cross.
    flexattn_cuda.attach(model, tiny_families.FAMILIES[name].settings("paper"))
    flexattn_cuda.save_adapter(model, folder / "start")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoint folders by name, saved when they are first asked for; no test changes them."""
    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            saved[name] = save(tmp_path_factory.mktemp(name), name)
        return saved[name]

    return folder


@pytest.fixture
def files(tmp_path):
    """(data, images): four records, one without an image, one with two questions and two images."""
    images = tmp_path / "images"
    images.mkdir()
    for number, size in enumerate([(160, 120), (60, 150), (96, 96), (40, 40)]):
        question_files.image(*size, seed=number).save(images / f"{number}.png")
    records = [
        record("0.png", "<image>\nwhat is this", "w20"),
        record("1.png", "<image>\nwhat is this", "w21 w22"),
        record(None, "what is", "w23"),
        record(["2.png", "3.png"], "<image> <image> is this", "w24", "what", "w25 w26 w27"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json", images


def train_adapter(files: tuple[Path, Path], output: Path, folder: Path, **changes: Any) -> dict[int, float]:
    options = dict(adapter=str(folder / "start")) | RUN | changes
    return train_on(files, output, folder, **options).losses


def items(folder: Path, files: tuple[Path, Path]) -> tuple[Any, Any, Conversations]:
    """Return the model, its processor and its data set."""
    model, processor = load_attached(folder, "cpu", None, folder / "start")
    encode = lambda conversation: data.encode(processor, conversation, 500, images=files[1])  # noqa: E731
    return model, processor, Conversations(data.read_records(files[0]), range(4), files[1], processor, encode)


def each(records: Conversations) -> list[dict[str, Any]]:
    return [records[number] for number in range(len(records))]


# ------------------------------------------------------------------------------------------------------------- labels


@families
def test_labels_cover_the_answers_with_their_ends_and_nothing_else(folders, files, name):
    """Written out by hand: the tokenizer has one id per word, and an image token for each cell of its LR view."""
    _, _, records = items(folders(name), files)
    what, is_, this, user, assistant, end = 3, 4, 5, 6, 7, 2
    sides = {"internvl_qwen2": [(4, 4), (4, 4)], "qwen2_5_vl": [(6, 6), (5, 5)]}[name]
    images = []
    for rows, columns in sides:
        cells = [tiny_families.IMAGE] * rows * columns
        frame = (
            (tiny_families.VISION_START, tiny_families.VISION_END) if name == "qwen2_5_vl" else (0, 0)
        )  # <img> is not in the tokenizer of InternVL
        images += [frame[0], *cells, frame[1]]
    prompt = [user, *images, is_, this, assistant]
    later = [user, what, assistant]
    item = records[3]
    assert item["input_ids"].tolist() == [*prompt, 24, end, *later, 25, 26, 27, end]
    ignored = data.IGNORED
    expected = [*[ignored] * len(prompt), 24, end, *[ignored] * len(later), 25, 26, 27, end]
    assert item["labels"].tolist() == expected


@families
def test_what_comes_before_an_answer_is_what_generate_continues(folders, files, name):
    _, processor, records = items(folders(name), files)
    item = records[0]
    begin = int((item["labels"] != data.IGNORED).nonzero()[0])
    asked = processor(images=open_image(files[1] / "0.png"), text=processor.prompt("what is this"))
    assert item["input_ids"][:begin].tolist() == asked["input_ids"][0].tolist()
    for feature in ("pixel_values", "pixel_values_hr"):
        ours, theirs = item[feature], asked[feature]
        assert len(ours) == len(theirs) and all(torch.equal(*pair) for pair in zip(ours, theirs))


def test_a_template_that_changes_earlier_answers_renders_single_questions_only(tmp_path):
    _, processor = load_attached(save(tmp_path, "internvl_qwen2", FORGETFUL), "cpu", None)
    single = data.labelled_ids(processor, [Turn("what", 0, "w20")])
    assert single.labels[-2:] == [20, 2]
    with pytest.raises(BrokenRecordError, match="renders single questions only; this conversation has 2"):
        data.labelled_ids(processor, [Turn("what", 0, "w20"), Turn("is", 0, "w21")])


def test_the_text_of_an_image_token_in_a_question_is_listed(folders, files):
    _, processor = load_attached(folders("qwen2_5_vl"), "cpu", None)
    with pytest.raises(InputError, match=r"contains '<\|image_pad\|>', a special token"):
        data.encode(processor, Conversation([], [Turn("what <|image_pad|>", 0, "w20")]), 500)


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "paligemma"])
@torch.no_grad()
def test_the_loss_of_a_step_is_that_of_its_records_divided_by_all_its_answer_tokens(tmp_path, files, name):
    """Records with two images, one and none, of different shapes, padded on the right."""
    model, processor, records = items(save(tmp_path / "model", name), files)
    model.double()
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
    trainer = FlexAttnTrainer(model, arguments)
    collate, answers = Collator(processor.pad_id, processor.token_types), torch.tensor(20)
    if name == "gemma3" and transformers.__version__.startswith("5.0."):
        with pytest.raises(InputError, match="computes the loss of gemma3 by itself; install a newer one"):
            trainer.compute_loss(model, collate([records[0]]))
        return
    alone = [trainer.compute_loss(model, collate([one]), num_items_in_batch=answers).item() for one in each(records)]
    together = trainer.compute_loss(model, collate(each(records)), num_items_in_batch=answers).item()
    assert together == pytest.approx(sum(alone), rel=1e-5)
    means = trainer.compute_loss(model, collate([records[0]])).item()
    assert means == pytest.approx(alone[0] * 20 / 2, rel=1e-5)  # an answer of a word, and its end


# --------------------------------------------------------------------------------------------------------------- runs


@families
def test_hr_projections_alone_are_trained_and_the_adapter_answers(folders, files, tmp_path, flexattn, name):
    folder, output = folders(name), tmp_path / "out"
    losses = train_adapter(files, output, folder, batch_size=4)  # all records: losses can be compared
    assert losses[6] < 0.9 * losses[1]
    assert {path.name for path in output.iterdir() if path.is_file()} - {"run.json", "loss.csv"} >= ADAPTER
    assert not list(output.rglob("model*.safetensors"))
    begun, trained = (load(folder, "cpu", adapter=one)[0] for one in (folder / "start", output))
    before = dict(begun.named_parameters())
    changed = {key for key, weight in trained.named_parameters() if not torch.equal(weight, before[key])}
    assert changed == {key for key in before if "_proj_hd." in key}
    image = files[1] / "0.png"
    expected = ask(*load(folder, "cpu", adapter=output), image, "what is this", max_new_tokens=3).text
    options = ("--model", folder, "--adapter", output, "--max-new-tokens", 3, "--device", "cpu")
    code, out, err = flexattn("ask", image, "what is this", *options)
    assert code == 0 and out.strip() == expected, err


@families
def test_a_resumed_run_equals_an_uninterrupted_one(folders, files, tmp_path, name):
    folder, whole, resumed = folders(name), tmp_path / "whole", tmp_path / "resumed"
    losses = train_adapter(files, whole, folder)
    shutil.copytree(whole, resumed)
    for path in (resumed / "checkpoint-6", resumed / "flexattn_adapter.safetensors"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert {path.name for path in (resumed / "checkpoint-4").iterdir()} >= ADAPTER
    assert train_adapter(files, resumed, folder) == losses
    ours, theirs = (load_file(one / "flexattn_adapter.safetensors") for one in (resumed, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@families
def test_recomputing_activations_and_accumulating_batches_change_no_loss(folders, files, tmp_path, name):
    options = dict(steps=3, batch_size=4, optimizer="sgd", schedule="constant", learning_rate=0.5, precision="float64")
    plain = train_adapter(files, tmp_path / "plain", folders(name), **options)
    options |= dict(batch_size=1, accumulate=4, gradient_checkpointing=True)
    assert train_adapter(files, tmp_path / "parts", folders(name), **options) == pytest.approx(plain, rel=1e-5)


@families
def test_bfloat16_learns_and_keeps_float32_projections(folders, files, tmp_path, name):
    losses = train_adapter(files, tmp_path / "out", folders(name), precision="bfloat16", batch_size=4)
    assert losses[6] < 0.9 * losses[1]
    saved = load_file(tmp_path / "out" / "flexattn_adapter.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def test_a_batch_without_images_is_trained_on(folders, files, tmp_path):
    files[0].write_text(json.dumps([record(None, "what is", "w23")]))
    losses = train_adapter(files, tmp_path / "out", folders("internvl_qwen2"), steps=2, batch_size=1)
    assert losses[1] == losses[2]


@pytest.mark.slow
@families
def test_two_processes_train_like_one_with_twice_the_batch(folders, files, tmp_path, name):
    """One record at a time: now and then a process has no image, and nothing that is trained takes part."""
    options = dict(optimizer="sgd", schedule="constant", learning_rate=0.5, precision="float64", device="cpu", steps=8)
    line = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    line += ["--data", files[0], "--images", files[1], "--model", folders(name), "--output", tmp_path / "two"]
    line += ["--adapter-only", "--adapter", folders(name) / "start", "--batch-size", 1]
    ran = subprocess.run(command(*line, processes=2), env=environment(), capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    train_adapter(files, tmp_path / "one", folders(name), batch_size=2, **options)
    one, two, begun = (
        load_file(path / "flexattn_adapter.safetensors")
        for path in (tmp_path / "one", tmp_path / "two", folders(name) / "start")
    )
    assert furthest(one, two) <= 1e-8 and furthest(one, begun) > 1e-4


@pytest.mark.parametrize("name", [*FAMILIES, "smolvlm"])
def test_lora_is_trained_on_queries_keys_values_and_hr_projections(folders, files, tmp_path, name):
    folder, whole, resumed = folders(name), tmp_path / "whole", tmp_path / "resumed"
    losses = train_adapter(files, whole, folder, lora=4, batch_size=4)
    assert losses[6] < 0.9 * losses[1] and not list(whole.rglob("model*.safetensors"))
    before, after = (dict(load(folder, "cpu", adapter=one)[0].named_parameters()) for one in (folder / "start", whole))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.split(".")[-2] for key in changed} == {"q_proj", "k_proj", "v_proj", "k_proj_hd", "v_proj_hd"}
    assert not any("vision" in key for key in changed)

    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    assert train_adapter(files, resumed, folder, lora=4, batch_size=4) == losses
    ours, theirs = (load_file(one / "adapter_model.safetensors") for one in (resumed, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(adapter="a"), "pass --adapter-only, or leave it out"),
        (dict(adapter_only=True), "--adapter-only needs --model"),
        (dict(adapter_only=True, model="m", system="hd"), "leave one of --system and --adapter-only out"),
        (dict(adapter_only=True, model="m", train="projector"), "an adapter has no projector; leave one of"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        TrainOptions(data="d", images="i", output="o", **options)


def test_models_that_cannot_be_trained_so_are_refused(folders, checkpoint, files, tmp_path, flexattn):
    def said(model: Path, *more: Any) -> str:
        required = ("--data", files[0], "--images", files[1], "--output", tmp_path / "out", "--model", model)
        return refused(flexattn("train", *required, "--device", "cpu", *more))

    folder = folders("internvl_qwen2")
    assert "train them with --train hr in place of --adapter-only" in said(checkpoint, "--adapter-only")
    other = folders("qwen2_5_vl") / "start"
    assert "the adapter is for qwen2_5_vl" in said(folder, "--adapter-only", "--adapter", other)
    assert "for paligemma cannot be trained" in said(save(tmp_path / "model", "paligemma"), "--adapter-only")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    assert "is the folder of the adapter" in said(folder, "--adapter-only", "--adapter", tmp_path / "out")


def test_an_adapter_with_lora_is_not_gone_on_from(folders, files, tmp_path):
    shutil.copytree(folders("internvl_qwen2") / "start", tmp_path / "start")
    (tmp_path / "start" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="was trained with --lora; start from one that was not"):
        train_adapter(files, tmp_path / "out", folders("internvl_qwen2"), adapter=str(tmp_path / "start"))


def test_a_missing_image_is_listed_whose_size_decides_the_length_of_its_record(folders, files, tmp_path):
    (files[1] / "1.png").unlink()
    outcome = train_on(
        files, tmp_path / "out", folders("qwen2_5_vl"), adapter_only=True, check_only=True, device="cpu", max_length=60
    )
    assert [(one.record, one.kind) for one in outcome.broken] == [(1, "missing image"), (3, "record too long")]
