"""Adapters of PEFT on models that FlexAttention was attached to: LoRA, DoRA, QLoRA, and TRL's trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import family_processors
import numpy as np
import pytest
import quantised
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from PIL import Image
from tiny_families import FAMILIES, Family
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import flexattn_cuda
from flexattn_cuda.errors import CheckpointError
from flexattn_cuda.inputs.hr_processor import HRProcessor, processor_for
from flexattn_cuda.mechanism.pool import are_plain
from flexattn_cuda.tasks.trl import with_model_loss

INTERNVL = FAMILIES["internvl_qwen2"]
TARGETS = ["q_proj", "k_proj", "v_proj", "k_proj_hd", "v_proj_hd"]
ROUNDING = 1e-6  # of the max logit: norms compute in float32, whatever the model computes in

families = pytest.mark.parametrize("family", [INTERNVL, FAMILIES["qwen2_5_vl"]], ids=str)
methods = pytest.mark.parametrize("method", ["lora", "dora"])


def lora(method: str = "lora", targets: list[str] = TARGETS) -> LoraConfig:
    return LoraConfig(r=4, use_dora=method == "dora", target_modules=targets, task_type="CAUSAL_LM")


def wrapped(family: Family, method: str, started: bool = True) -> tuple[PeftModel, dict[str, Any]]:
    """Return a float64 model with an adapter that changes it, and a batch for it."""
    model = flexattn_cuda.attach(family.model(dtype=torch.float64), family.settings("paper"))
    torch.manual_seed(1)
    made = get_peft_model(model, lora(method))
    if started:
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return made, family.inputs((2, 1), ragged=True, dtype=torch.float64)


def answers(inputs: dict[str, Any]) -> torch.Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    return labels


@families
@methods
def test_a_new_adapter_changes_neither_logits_nor_loss(family, method):
    model, inputs = wrapped(family, method, started=False)
    labels = answers(inputs)
    with torch.no_grad():
        ours = model(**inputs, labels=labels)
        with model.disable_adapter():
            theirs = model.get_base_model()(**inputs, labels=labels)
    assert (ours.logits - theirs.logits).abs().max() <= ROUNDING * theirs.logits.abs().max()
    assert abs(ours.loss - theirs.loss) <= ROUNDING * theirs.loss


@families
@methods
def test_every_adapter_gets_gradients_those_of_hr_projections_too(family, method):
    model, inputs = wrapped(family, method)
    model(**inputs, labels=answers(inputs)).loss.backward()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert any("v_proj_hd.lora_A" in name for name in trained) and all("lora_" in name for name in trained)
    assert [name for name, one in trained.items() if one.grad is None or not one.grad.any()] == []


@families
@methods
@torch.no_grad()
def test_a_merged_adapter_gives_the_same_logits_and_tokens(family, method):
    model, inputs = wrapped(family, method)
    logits = model(**inputs).logits
    prompt = {name: value for name, value in inputs.items() if name != "position_ids"}
    prompt |= dict(max_new_tokens=4, do_sample=False)
    tokens = model.generate(**prompt)
    with model.disable_adapter():
        assert (model(**inputs).logits - logits).abs().max() > 0.1, "the adapter does something"
    assert torch.equal(model.generate(**prompt, hr_cache=False), tokens)
    merged = model.merge_and_unload()
    assert (merged(**inputs).logits - logits).abs().max() <= ROUNDING * logits.abs().max()
    assert torch.equal(merged.generate(**prompt), tokens)


@methods
@torch.no_grad()
def test_a_saved_adapter_is_loaded_onto_a_model_that_is_attached_to_first(method, tmp_path):
    model, inputs = wrapped(INTERNVL, method)
    model.save_pretrained(tmp_path)
    base = flexattn_cuda.attach(INTERNVL.model(dtype=torch.float64), INTERNVL.settings("paper"))
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(**inputs).logits, model(**inputs).logits)


def test_projections_with_an_adapter_are_not_plain_until_it_is_merged():
    model, _ = wrapped(INTERNVL, "lora")
    module = INTERNVL.text_model(model.get_base_model()).layers[3].self_attn
    assert not are_plain(module, module.o_proj.weight)
    model.merge_and_unload()
    assert are_plain(module, module.o_proj.weight)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_model_that_peft_wraps_is_refused():
    model = get_peft_model(INTERNVL.model(), lora(targets=["q_proj"]))
    with pytest.raises(ValueError, match="attach FlexAttention to the model before PEFT wraps it, or merge") as error:
        flexattn_cuda.attach(model)
    assert "\n" not in str(error.value)


def test_an_adapter_on_the_keys_of_a_model_is_refused_and_one_elsewhere_is_not():
    model = INTERNVL.model()
    get_peft_model(model, lora(targets=["k_proj"]))  # changes the model itself
    with pytest.raises(ValueError, match="an adapter of PEFT changes the model's keys or values; attach FlexAttention"):
        flexattn_cuda.attach(model, INTERNVL.settings())
    other = INTERNVL.model()
    get_peft_model(other, lora(targets=["q_proj", "o_proj"]))
    assert flexattn_cuda.attach(other, INTERNVL.settings())(**INTERNVL.inputs((1,))).logits.isfinite().all()


def test_an_adapter_of_peft_is_merged_before_hr_projections_are_saved(tmp_path):
    model, _ = wrapped(INTERNVL, "lora")
    with pytest.raises(CheckpointError, match="k_proj_hd has an adapter of PEFT; merge it first"):
        flexattn_cuda.save_adapter(model, tmp_path)
    flexattn_cuda.save_adapter(model.merge_and_unload(), tmp_path)
    assert flexattn_cuda.attach(INTERNVL.model(), tmp_path)(**INTERNVL.inputs((1,))).logits.isfinite().all()


@torch.no_grad()
def test_hr_projections_without_an_adapter_are_saved_from_the_wrapped_model(tmp_path):
    model = flexattn_cuda.attach(INTERNVL.model(), INTERNVL.settings())
    flexattn_cuda.save_adapter(get_peft_model(model, lora(targets=["q_proj"])), tmp_path)
    assert flexattn_cuda.attach(INTERNVL.model(), tmp_path).flexattn_settings == model.flexattn_settings


# ------------------------------------------------------------------------------------------------------------- QLoRA

STEPS = 20


class Stop(TrainerCallback):
    """Ends a run after some steps, as an interruption would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def qlora(base: Path) -> PeftModel:
    model = quantised.load(type(INTERNVL._skeleton), base, "4bit")
    flexattn_cuda.attach(model, INTERNVL.settings("paper"))
    torch.manual_seed(1)
    return get_peft_model(prepare_model_for_kbit_training(model), lora())


def trainer(model: PeftModel, folder: Path, callbacks: tuple[TrainerCallback, ...] = ()) -> Trainer:
    batches = [
        inputs | {"labels": answers(inputs)} for inputs in (INTERNVL.inputs((1,), seed=seed) for seed in range(4))
    ]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=STEPS // 2,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=batches, data_collator=lambda rows: rows[0], callbacks=[*callbacks])


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_qlora_learns_resumes_exactly_and_merges_within_the_quantisation(tmp_path, codes_in_order):
    base = tmp_path / "base"
    INTERNVL.model().save_pretrained(base)
    whole = trainer(qlora(base), tmp_path / "whole")
    whole.train()
    assert np.mean(losses(whole)[-4:]) < 0.5 * np.mean(losses(whole)[:4])

    trainer(qlora(base), tmp_path / "parts", (Stop(STEPS // 2),)).train()
    resumed = trainer(qlora(base), tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    weights = [{name: one for name, one in run.model.named_parameters() if "lora_" in name} for run in (whole, resumed)]
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())

    inputs, model = INTERNVL.inputs((1,)), whole.model.eval()
    with torch.no_grad():
        logits, of_4_bit = model(**inputs).logits, flexattn_cuda.attach(INTERNVL.model(), INTERNVL.settings("paper"))
        with model.disable_adapter():
            of_quantisation = quantised.distance(model(**inputs).logits, of_4_bit(**inputs).logits)
        merged = model.merge_and_unload()
        assert quantised.distance(merged(**inputs).logits, logits) <= 1.2 * of_quantisation
    module = INTERNVL.text_model(merged).layers[3].self_attn
    assert type(module.k_proj_hd) is nn.Linear and type(module.k_proj) is not nn.Linear


# --------------------------------------------------------------------------------------------------------------- TRL


def model_with_processor() -> tuple[transformers.PreTrainedModel, HRProcessor]:
    """Return an InternVL for the tiny tokenizer."""
    own, config = family_processors.parts("internvl"), INTERNVL._skeleton.config.to_dict()
    tower = config["vision_config"] | {"image_size": [family_processors.SIDE] * 2, "patch_size": [14, 14]}
    made = transformers.InternVLConfig(
        vision_config=tower,
        text_config=config["text_config"] | {"vocab_size": len(own.tokenizer)},
        image_token_id=own.tokenizer.get_vocab()["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(made)
    settings = dataclasses.replace(flexattn_cuda.settings_for(model), threshold=0.01)  # random maps are flat
    flexattn_cuda.attach(model, settings)
    return model, processor_for(model, own)


def sft(trainer_class: type[SFTTrainer], folder: Path, method: str) -> SFTTrainer:
    model, processor = model_with_processor()
    pixels = np.random.default_rng(0).integers(0, 255, (4, 60, 80, 3), dtype=np.uint8)
    talk = [{"role": "user", "content": "what is this"}, {"role": "assistant", "content": "what this"}]
    data = Dataset.from_list([{"images": [Image.fromarray(one)], "messages": talk} for one in pixels])
    arguments = SFTConfig(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        max_length=None,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    return trainer_class(model, arguments, train_dataset=data, processing_class=processor, peft_config=lora(method))


@pytest.mark.slow
@methods
def test_trl_trains_on_messages_with_images(tmp_path, method):
    run = sft(with_model_loss(SFTTrainer), tmp_path, method)
    run.train()
    assert len(losses(run)) == 3 and np.isfinite(losses(run)).all() and losses(run)[-1] < losses(run)[0]
    started_at_zero = [one for name, one in run.model.named_parameters() if "_proj_hd.lora_B" in name]
    assert started_at_zero and all(one.any() for one in started_at_zero), "HR tokens are seen"


@pytest.mark.slow
def test_the_loss_of_trl_that_would_ignore_hr_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="past the forward of the model.*with_model_loss"):
        sft(SFTTrainer, tmp_path, "lora").train()
