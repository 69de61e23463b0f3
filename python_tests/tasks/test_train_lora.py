"""`train --lora` and `ask --adapter`: what is trained, resumed, written and merged."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import tiny_checkpoint
import torch
from peft import PeftModel
from question_files import QUESTION
from refusals import refused
from safetensors.torch import load_file
from training_data import train_on

from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.tasks.load import load
from flexattn_cuda.tasks.options import TrainOptions

RUN = dict(steps=6, save_every=2, keep=3, batch_size=2, learning_rate=1e-2, device="cpu", lora=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, checkpoint):
    """The data, and the output folder and the losses of a run."""
    from training_data import write

    folder = tmp_path_factory.mktemp("lora")
    files = write(folder)
    return files, folder / "out", train_on(files, folder / "out", checkpoint, **RUN).losses


def changed(checkpoint: Path, adapter: Path) -> set[str]:
    """Return the weights of a checkpoint that an adapter changes."""
    before, after = (dict(load(checkpoint, "cpu", adapter=one)[0].named_parameters()) for one in (None, adapter))
    assert before.keys() == after.keys()
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


@pytest.mark.slow
def test_a_run_writes_an_adapter_alone_and_its_loss_falls(trained):
    _, output, losses = trained
    assert losses[6] < losses[1]
    assert {"adapter_model.safetensors", "flexattn_adapter.json"} <= {path.name for path in output.iterdir()}
    assert not (output / "model.safetensors").exists()
    assert all("lora_" in name and "language_model" in name for name in load_file(output / "adapter_model.safetensors"))


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(trained, checkpoint, tmp_path):
    files, whole, losses = trained
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoint-6")
    (output / "adapter_model.safetensors").unlink()
    assert train_on(files, output, checkpoint, **RUN).losses == losses
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (output, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_run_with_another_rank_is_not_resumed(trained, checkpoint):
    files, output, _ = trained
    with pytest.raises(InputError, match=r"was started with other options \(lora\)"):
        train_on(files, output, checkpoint, **RUN | {"lora": 8})


@pytest.mark.slow
@torch.no_grad()
def test_the_adapter_is_merged_into_queries_keys_values_and_hr_projections(trained, checkpoint, flexattn, image):
    _, output, _ = trained
    names = changed(checkpoint, output)
    of_kind = {name.split(".")[-2] for name in names}
    assert of_kind == {"q_proj", "k_proj", "v_proj", "k_proj_hd", "v_proj_hd"}
    assert all("language_model" in name and name.endswith(".weight") for name in names)

    (base, processor), (merged, _) = load(checkpoint, "cpu"), load(checkpoint, "cpu", adapter=output)
    inputs = processor(images=open_image(image), text=processor.prompt(QUESTION))
    plain = base(**inputs).logits
    adapted = PeftModel.from_pretrained(base, output)(**inputs).logits
    assert (merged(**inputs).logits - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    assert (adapted - plain).abs().max() > 1e-2 * plain.abs().max()

    options = ("--model", checkpoint, "--adapter", output, "--max-new-tokens", 3, "--device", "cpu")
    code, out, err = flexattn("ask", image, QUESTION, *options)
    assert code == 0 and out, err


@pytest.mark.slow
def test_hr_projections_can_be_adapted_alone(checkpoint, files, tmp_path):
    train_on(files, tmp_path / "out", checkpoint, **RUN | dict(steps=2, train="hr"))
    assert {name.split(".")[-2] for name in changed(checkpoint, tmp_path / "out")} == {"k_proj_hd", "v_proj_hd"}


@pytest.mark.slow
def test_an_adapter_of_another_model_is_refused(trained, tmp_path, flexattn, image):
    _, output, _ = trained
    other = tiny_checkpoint.save_released(tmp_path / "released")
    with pytest.raises(CheckpointError, match="the adapter is for flexattn_llava"):
        load(other, "cpu", adapter=output)
    said = refused(flexattn("ask", image, QUESTION, "--model", other, "--adapter", output, "--quantize", "4bit"))
    assert "--lora takes no flexattn, system and quantize beside it" in said


def test_what_lora_cannot_train_is_refused(checkpoint, files, tmp_path, monkeypatch):
    required = dict(data=files[0], images=files[1], output=tmp_path / "out")
    with pytest.raises(InputError, match="--lora adapts attention, not the projector"):
        TrainOptions(**required, lora=4, train="projector")
    with pytest.raises(InputError, match="lora is 0; it must be at least 1"):
        TrainOptions(**required, lora=0)
    with pytest.raises(InputError, match="--lora needs FlexAttention, but the system is xattn"):
        train_on(files, tmp_path / "out", checkpoint, **RUN, system="xattn")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest))
    with pytest.raises(InputError, match="LoRA needs the package peft: pip install"):
        train_on(files, tmp_path / "out", checkpoint, **RUN)
