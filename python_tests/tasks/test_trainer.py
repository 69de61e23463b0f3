"""The trainer: its batches, its loss, and its gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from flexattn_cuda import Trace
from flexattn_cuda.tasks import training_data as data
from flexattn_cuda.tasks.train import FlexAttnTrainer, answer_loss, choose_trained


class Features(Dataset):
    """Images that were encoded before, and prompts about them: what a study of many runs trains on."""

    def __init__(self, model, count: int = 6):
        with torch.no_grad():
            features, hr_features = model.encode(None, tiny.images(count))
        self.items = []
        for number in range(count):
            ids = tiny.prompt(3, "image", 8 + number, seed=number)
            labels = torch.where(torch.arange(len(ids)) >= len(ids) - 2 - number % 3, ids, data.IGNORED)
            one = dict(image_features=features[number : number + 1], hr_features=hr_features[number : number + 1])
            self.items.append(dict(input_ids=ids, labels=labels, **one))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


def small_trainer(model, folder: Path, optimizers=(None, None), **changes) -> FlexAttnTrainer:
    arguments = dict(
        per_device_train_batch_size=2, max_steps=6, learning_rate=0.1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    arguments |= dict(save_strategy="no", logging_steps=1, remove_unused_columns=False)
    return FlexAttnTrainer(
        model,
        TrainingArguments(str(folder), **(arguments | changes)),
        train_dataset=Features(model),
        data_collator=data.Collator(pad_id=0),
        optimizers=optimizers,
    )


def test_precomputed_features_and_a_custom_optimizer_are_accepted(tmp_path):
    model = tiny.flex()
    choose_trained(model, "hr")
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    one = small_trainer(model, tmp_path, (optimizer, schedule))
    one.train()
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 7)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all("_proj_hd" in name for name in changed)


def test_alpha_follows_the_epochs(tmp_path):
    model = tiny.flex(tiny.settings(warmup=0.75))
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("hr_alpha")), with_kwargs=True)
    one = small_trainer(
        model, tmp_path, num_train_epochs=2, max_steps=-1, gradient_accumulation_steps=1
    )  # three steps an epoch
    one.train()
    assert seen == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    seen.clear()
    one.evaluate(Features(model, 2))
    assert seen == [None]  # evaluation uses the full weight


def test_only_selected_hr_tokens_are_projected():
    model = tiny.flex(tiny.PRESETS["released"])
    projected: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.endswith(("k_proj_hd", "v_proj_hd")):
            module.register_forward_hook(
                lambda _, args, __, name=name: projected.__setitem__(name, projected.get(name, 0) + len(args[0]))
            )
    trace = Trace()
    batch = data.Collator(0)([Features(model)[number] for number in (1, 4)])
    model(**batch, flexattn_trace=trace).loss.backward()
    assert len(projected) == 2 * len(model.config.hr_layers)
    for name, rows in projected.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        mask = trace.steps[0][layer - 1].mask  # [B, rows, images, h*h]
        selected = mask.flatten(2).any(1).sum().item()
        assert rows == selected and 0 < selected < mask.shape[0] * mask[0, 0].numel()


def test_the_loss_equals_that_of_transformers():
    model = tiny.flex()
    batch = data.Collator(0)([Features(model)[number] for number in range(3)])
    theirs = model(**batch).loss, model(**batch, num_items_in_batch=torch.tensor(20)).loss
    model.loss_function = answer_loss
    ours = model(**batch).loss, model(**batch, num_items_in_batch=torch.tensor(20)).loss
    assert torch.stack(ours).tolist() == pytest.approx(torch.stack(theirs).tolist(), rel=1e-6)
    assert model.double()(**batch).loss.dtype == torch.float64


def test_gradients_are_the_same_with_checkpointing(tmp_path):
    gradients = []
    for enabled in (False, True):
        model = tiny.flex(tiny.PRESETS["released"]).double()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        one = small_trainer(model, tmp_path)
        one.state.epoch = 0.2
        one.compute_loss(model.train(), next(iter(one.get_train_dataloader()))).backward()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == enabled
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("_proj_hd" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-12, atol=1e-14), name


@pytest.mark.slow
def test_mixed_precision_with_loss_scaling_learns_like_float32():
    """What accelerate does on a GPU with fp16=True (the V100 has no bfloat16), on the CPU."""
    losses: dict[bool, list[float]] = {}
    for half in (False, True):
        model = tiny.flex(tiny.PRESETS["released"]).train()
        model.loss_function = answer_loss
        choose_trained(model, "all")
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.02)
        scaler = torch.amp.GradScaler("cpu", enabled=half)
        batch = data.Collator(0)(Features(model).items)
        pixels = dict(pixel_values_hr=tiny.images(len(batch["input_ids"])))
        batch = {name: value for name, value in batch.items() if "features" not in name} | pixels
        for step in range(15):
            with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                output = model(**batch, hr_alpha=min(1.0, step / 5))
            assert not half or output.logits.dtype == torch.float16
            optimizer.zero_grad()
            scaler.scale(output.loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert torch.isfinite(norm)
            scaler.step(optimizer)
            scaler.update()
            losses.setdefault(half, []).append(output.loss.item())
    assert losses[True][-1] < 0.9 * losses[True][0]
    assert losses[True] == pytest.approx(losses[False], rel=10 * 2**-11)  # ten roundings to float16
