"""`flexattn train`: runs that were ended go on, processes agree, and what is trained is what is said."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import tiny_checkpoint
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from training_data import record, save_preset, write
from transformers import TrainingArguments

from flexattn_cuda import Trace
from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import train as training
from flexattn_cuda.tasks import training_data as data
from flexattn_cuda.tasks.load import load
from flexattn_cuda.tasks.train import (
    FlexAttnTrainer,
    answer_loss,
    choose_trained,
    last_complete_checkpoint,
    train,
)

ROOT = Path(__file__).parents[2]
SGD = dict(optimizer="sgd", schedule="constant", learning_rate=0.5, precision="float64", device="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path):
    """(data, images)"""
    return write(tmp_path)


def command(*arguments, processes: int = 1) -> list[str]:
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    )
    return [sys.executable, *launcher, "-m", "flexattn_cuda.cli", "train", *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The tests' own path order decides which transformers is meant; the package is this one in either case.
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths[::-1]), "OMP_NUM_THREADS": "1"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_killed_at_random_and_resumed_ends_as_if_nothing_had_happened(checkpoint, files, tmp_path):
    settings = dict(steps=20, save_every=2, batch_size=2, accumulate=2, learning_rate=1e-2, seed=3, device="cpu")
    whole = train(*files, tmp_path / "whole", checkpoint, **settings)
    assert whole.losses.keys() == set(range(1, 21)) and whole.losses[20] < whole.losses[1]

    output = tmp_path / "killed"
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    started = command(
        "--data",
        files[0],
        "--images",
        files[1],
        "--model",
        checkpoint,
        "--output",
        output,
        *options,
    )
    last = random.randrange(3, 13)  # well before the end
    process = subprocess.Popen(started, env=environment(), stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if (output / "loss.csv").exists() and len((output / "loss.csv").read_bytes().splitlines()) > last:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, said
    assert not (output / "model.safetensors").exists()

    resumed = train(*files, output, checkpoint, **settings)
    assert resumed.losses == whole.losses
    assert (output / "loss.csv").read_text() == (tmp_path / "whole" / "loss.csv").read_text()
    assert furthest(weights(output), weights(tmp_path / "whole")) == 0


@pytest.mark.slow
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(checkpoint, files, tmp_path):
    settings = dict(steps=6, save_every=2, batch_size=4, learning_rate=1e-2, device="cpu", keep=3)
    whole = train(*files, tmp_path, checkpoint, **settings)
    expected = weights(tmp_path)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "complete.json"):
        path = tmp_path / "checkpoint-6" / name
        path.write_bytes(path.read_bytes()[:-7])
        assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
        assert train(*files, tmp_path, checkpoint, **settings).losses == whole.losses
        assert furthest(weights(tmp_path), expected) == 0
    (tmp_path / "checkpoint-6" / "scheduler.pt").unlink()
    (tmp_path / "checkpoint-4" / "complete.json").unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.slow
def test_a_run_that_has_ended_is_not_trained_further(checkpoint, files, tmp_path):
    settings = dict(steps=2, batch_size=4, learning_rate=1e-2, device="cpu")
    before = train(*files, tmp_path, checkpoint, **settings), weights(tmp_path)
    assert train(*files, tmp_path, checkpoint, **settings) == before[0] and furthest(weights(tmp_path), before[1]) == 0


@pytest.mark.slow
def test_a_run_of_other_settings_is_refused_unless_it_begins_anew(checkpoint, files, tmp_path):
    settings = dict(steps=2, batch_size=4, device="cpu")
    train(*files, tmp_path, checkpoint, **settings, learning_rate=1e-3)
    with pytest.raises(InputError, match="was begun with another learning rate, seed; .* --restart"):
        train(*files, tmp_path, checkpoint, **settings, learning_rate=1e-2, seed=1)
    again = train(*files, tmp_path, checkpoint, **settings, learning_rate=1e-2, seed=1, restart=True)
    assert len(again.losses) == 2


@pytest.mark.slow
def test_a_run_goes_on_with_the_records_and_images_it_was_begun_with(checkpoint, files, tmp_path):
    settings = dict(model=checkpoint, steps=1, batch_size=4, device="cpu")
    output = tmp_path / "out"
    train(*files, output, **settings)
    moved = files[1].rename(tmp_path / "moved")
    with pytest.raises(InputError, match="was begun with another folder of images; "):
        train(files[0], moved, output, **settings)
    files[1].symlink_to(moved)
    with pytest.raises(InputError, match="was begun with another folder of images; "):
        train(*files, output, **settings)
    files[1].unlink()
    moved.rename(files[1])
    (files[1] / "2.png").rename(tmp_path / "2.png")
    with pytest.raises(InputError, match="was begun with another set of broken records; "):
        train(*files, output, **settings)
    (tmp_path / "2.png").rename(files[1] / "2.png")
    train(*files, output, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("content", ['{"a": ', "[]", "null", "\udcff"])
def test_settings_that_no_run_has_written_are_refused(checkpoint, files, tmp_path, content):
    (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="run.json does not hold the settings of a run; .* --restart"):
        train(*files, tmp_path, checkpoint, steps=1, device="cpu")
    train(*files, tmp_path, checkpoint, steps=1, device="cpu", restart=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "log_every, step, whole",
    [(1, 3, "the last complete checkpoint is .*checkpoint-2$"), (4, 3, "no checkpoint")],
)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(
    checkpoint, files, tmp_path, monkeypatch, log_every, step, whole, what
):
    losses = []

    def third_is_wrong(*arguments, **options):
        loss = answer_loss(*arguments, **options)
        losses.append(loss.item())
        if len(losses) == 3 and what == "gradient":
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss * math.nan if len(losses) == 3 and what == "loss" else loss

    monkeypatch.setattr(training, "answer_loss", third_is_wrong)
    with pytest.raises(InputError, match=f"the loss of step {step} or its gradient is not a number; .*{whole}"):
        train(
            *files,
            tmp_path,
            checkpoint,
            steps=3,
            save_every=log_every,
            log_every=log_every,
            device="cpu",
        )
    assert not (tmp_path / "checkpoint-3").exists() and not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_two_runs_never_write_one_folder(checkpoint, files, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # as the other run does
    with pytest.raises(InputError, match=f"another run is writing {tmp_path}"):
        train(*files, tmp_path, checkpoint, steps=1, device="cpu")
    os.close(folder)
    train(*files, tmp_path, checkpoint, steps=1, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("preset, batch", [("released", 2), ("paper", 1)])
def test_two_processes_train_as_one_with_the_doubled_batch(files, tmp_path, preset, batch):
    """One record at a time: now and then a process has no image at all."""
    checkpoint = save_preset(tmp_path / "model", preset)
    options = [
        "--steps",
        20,
        "--optimizer",
        "sgd",
        "--schedule",
        "constant",
        "--learning-rate",
        0.5,
        "--precision",
        "float64",
    ]
    options += [
        "--data",
        files[0],
        "--images",
        files[1],
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--batch-size",
        batch,
    ]
    ran = subprocess.run(
        command(*options, "--output", tmp_path / "two", processes=2),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    train(*files, tmp_path / "one", checkpoint, steps=20, batch_size=2 * batch, **SGD)
    one, two, begun = (weights(folder) for folder in (tmp_path / "one", tmp_path / "two", checkpoint))
    assert furthest(one, two) <= 1e-8
    assert all((one[name] - begun[name]).abs().max() > 1e-4 for name in one if "_proj_hd" in name)


@pytest.mark.slow
def test_accumulated_batches_train_as_one_batch(checkpoint, files, tmp_path):
    train(*files, tmp_path / "parts", checkpoint, steps=6, batch_size=1, accumulate=4, **SGD)
    train(*files, tmp_path / "whole", checkpoint, steps=6, batch_size=4, **SGD)
    assert furthest(weights(tmp_path / "parts"), weights(tmp_path / "whole")) <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("system", [None, "llava", "hd", "xattn"])
def test_every_system_learns_and_answers(checkpoint, files, tmp_path, system):
    outcome = train(
        *files,
        tmp_path / "out",
        checkpoint,
        system,
        steps=12,
        batch_size=8,
        learning_rate=1e-2,
        device="cpu",
        gradient_checkpointing=True,
    )
    assert outcome.losses[12] < 0.7 * outcome.losses[1]
    model, processor = load(tmp_path / "out", "cpu")
    assert model.config.system == (system or "flexattn")
    begun, _ = load(checkpoint, "cpu", system=system)
    tower = {name: weight for name, weight in begun.named_parameters() if "vision_tower" in name}
    assert tower and all(torch.equal(weight, model.get_parameter(name)) for name, weight in tower.items())
    answering.ask(
        model,
        processor,
        files[1] / "0.png",
        "Which digits stand on the red sign?",
        max_new_tokens=3,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, trained",
    [("all", "vision_tower"), ("projector", "multi_modal_projector"), ("hr", "_proj_hd")],
)
def test_only_the_part_that_is_named_is_trained(checkpoint, files, tmp_path, part, trained):
    train(
        *files,
        tmp_path,
        checkpoint,
        steps=2,
        batch_size=8,
        learning_rate=1e-2,
        device="cpu",
        part=part,
    )
    before, after = weights(checkpoint), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    named = {name for name in before if trained in name}
    if part == "all":
        assert changed and not changed & named
    else:
        assert changed == named


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_broken_records_are_counted_listed_and_left_out(flexattn, checkpoint, files, tmp_path):
    records = [
        *json.loads(files[0].read_text()),
        record("nowhere.png"),
        record("0.png", "<image>What?", " "),
        record("gone.png"),
    ]
    files[0].write_text(json.dumps(records))
    arguments = [
        "train",
        "--data",
        files[0],
        "--images",
        files[1],
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    ]
    code, _, err = flexattn(*arguments, "--steps", 2, "--batch-size", 8)
    assert code == 0
    for said in (
        "record 8: missing image: ",
        "record 9: empty answer: ",
        "record 10: missing image: ",
        "11 records, 3 of them broken",
    ):
        assert said in err
    assert "  2 missing image\n  1 empty answer\n" in err
    listed = [json.loads(line) for line in (tmp_path / "out" / "broken.jsonl").read_text().splitlines()]
    assert [(one["record"], one["kind"]) for one in listed] == [
        (8, "missing image"),
        (9, "empty answer"),
        (10, "missing image"),
    ]
    rows = list(csv.DictReader((tmp_path / "out" / "loss.csv").open()))
    assert [float(row["epoch"]) for row in rows] == [1.0, 2.0]  # eight records, eight at a time

    code, _, err = flexattn(*arguments, "--broken", "refuse", "--restart")
    assert code == 2 and err.splitlines()[-1].startswith(
        "flexattn: 3 of 11 records are broken, the first is record 8: missing image"
    )
    code, _, err = flexattn(*arguments, "--check-only")
    assert code == 0 and "11 records, 3 of them broken" in err


@pytest.mark.slow
def test_a_image_that_is_deleted_during_the_run_does_not_end_it(checkpoint, files, tmp_path, monkeypatch, capsys):
    check = data.check

    def then_delete(*arguments):
        found = check(*arguments)
        (files[1] / "0.png").unlink()
        return found

    monkeypatch.setattr(data, "check", then_delete)
    outcome = train(*files, tmp_path / "out", checkpoint, epochs=2, batch_size=4, device="cpu")
    assert len(outcome.losses) == 4
    assert capsys.readouterr().err.count("record 0: unreadable image: ") == 1
    assert json.loads((tmp_path / "out" / "broken.jsonl").read_text())["record"] == 0


@pytest.mark.parametrize(
    "options, says",
    [
        (["--batch-size", 0], "batch size is 0; it must be at least 1"),
        (["--epochs", 0], "epochs is 0.0; it must be more than 0"),
        (["--epochs", "inf"], "epochs is inf; it must be more than 0 and finite"),
        (["--learning-rate", "nan"], "learning rate is nan; it must be a finite number"),
        (["--learning-rate", "inf"], "learning rate is inf; it must be a finite number"),
        (["--seed", -1], "seed is -1; it must be at least 0 and less than 2**32"),
        (["--seed", 99999999999], "seed is 99999999999; it must be at least 0 and less than 2**32"),
        (["--keep", 1], "keep is 1; it must be at least 2"),
        (["--save-every", 5, "--log-every", 2], "falls between two entries of the loss"),
        (["--broken", "ignore"], "allowed: skip, refuse"),
        (["--optimizer", "best"], "the optimizer is 'best'; allowed: "),
        (["--schedule", "best"], "the schedule is 'best'; allowed: linear, "),
        (
            ["--schedule", "cosine_with_min_lr"],
            "the schedule is 'cosine_with_min_lr'; allowed: linear, ",
        ),
        (["--precision", "int8"], "the precision is 'int8'; allowed: auto, float32"),
        (["--precision", "float16"], "mixed precision in float16 needs a GPU"),
        (["--train", "nothing"], "allowed: all, projector, hr"),
        (
            ["--train", "hr", "--system", "llava"],
            "no projections for high-resolution tokens to train",
        ),
        (["--system", "vit"], "there is no system 'vit'; allowed: llava, hd"),
        (["--max-length", 100000], "the model has 512 positions"),
        (["--max-length", 10], "has no record that can be trained on"),
        (["--images", "nowhere"], "there is no folder nowhere of images"),
        (["--data", "nowhere.json"], "nowhere.json cannot be read"),
        (["--model", "nowhere"], "no checkpoint 'nowhere'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(flexattn, checkpoint, files, tmp_path, options, says):
    arguments = [
        "--data",
        files[0],
        "--images",
        files[1],
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    ]
    code, out, err = flexattn("train", *arguments, *options)
    assert code == 2 and out == "" and says in err.splitlines()[-1]


def test_the_model_is_not_written_over(flexattn, checkpoint, files):
    arguments = [
        "train",
        "--data",
        files[0],
        "--images",
        files[1],
        "--model",
        checkpoint,
        "--output",
        checkpoint / ".." / checkpoint.name,
    ]
    code, _, err = flexattn(*arguments)
    assert (
        code == 2
        and "is the folder of the model" in err.splitlines()[-1]
        and not (checkpoint / "images.jsonl").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize("schedule", training._SCHEDULES)
def test_every_schedule_that_is_offered_can_be_used(checkpoint, files, tmp_path, schedule):
    assert train(*files, tmp_path, checkpoint, steps=1, schedule=schedule, device="cpu").losses.keys() == {1}


@pytest.mark.parametrize("missing", [ImportError, ValueError])
def test_an_optimizer_whose_package_is_missing_is_refused(flexattn, checkpoint, files, tmp_path, monkeypatch, missing):
    def find(*_):
        raise missing("install it\nwith pip")

    monkeypatch.setattr(FlexAttnTrainer, "get_optimizer_cls_and_kwargs", find)
    arguments = [
        "train",
        "--data",
        files[0],
        "--images",
        files[1],
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    ]
    code, _, err = flexattn(*arguments, "--optimizer", "lion_8bit")
    assert code == 2 and err.splitlines()[-1] == "flexattn: the optimizer lion_8bit cannot be used: install it with pip"


def test_an_interrupted_run_gives_the_terminal_back(checkpoint, files, tmp_path, monkeypatch):
    shown = []

    class Shown(Progress):
        def __enter__(self):
            shown.append(self)
            return super().__enter__()

        def __exit__(self, *error):
            shown.remove(self)
            super().__exit__(*error)

    def interrupted(*_, **__):
        assert shown
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "Progress", Shown)
    monkeypatch.setattr(training, "answer_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(*files, tmp_path, checkpoint, steps=1, device="cpu", progress=True)
    assert not shown


@pytest.mark.parametrize("package", ["accelerate", "tensorboard"])
def test_a_missing_package_is_named(flexattn, checkpoint, files, tmp_path, monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name.startswith(package) else object())
    arguments = [
        "--data",
        files[0],
        "--images",
        files[1],
        "--model",
        checkpoint,
        "--output",
        tmp_path / "out",
        "--tensorboard",
    ]
    code, _, err = flexattn("train", *arguments)
    assert code == 2 and f"need{'s' if package == 'accelerate' else ''} the package {package}: pip install" in err


# -------------------------------------------------------------------------------------------------------------- trainer


class Features(Dataset):
    """Images that were encoded before, and prompts about them: what a study of many runs trains on."""

    def __init__(self, model, count: int = 6):
        with torch.no_grad():
            features, hr_features = model.encode(None, tiny.images(count))
        self.items = []
        for number in range(count):
            ids = tiny.prompt(3, "image", 8 + number, seed=number)
            labels = torch.where(torch.arange(len(ids)) >= len(ids) - 2 - number % 3, ids, data.IGNORED)
            one = dict(
                image_features=features[number : number + 1],
                hr_features=hr_features[number : number + 1],
            )
            self.items.append(dict(input_ids=ids, labels=labels, **one))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


def trainer(model, folder: Path, optimizers=(None, None), **changes) -> FlexAttnTrainer:
    arguments = dict(
        per_device_train_batch_size=2,
        max_steps=6,
        learning_rate=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    arguments |= dict(save_strategy="no", logging_steps=1, remove_unused_columns=False)
    return FlexAttnTrainer(
        model,
        TrainingArguments(str(folder), **(arguments | changes)),
        train_dataset=Features(model),
        data_collator=data.Collator(pad_id=0),
        optimizers=optimizers,
    )


def test_ready_features_and_an_optimizer_of_ones_own_are_taken(tmp_path):
    model = tiny.flex()
    choose_trained(model, "hr")
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    one = trainer(model, tmp_path, (optimizer, schedule))
    one.train()
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 7)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all("_proj_hd" in name for name in changed)


def test_alpha_follows_the_epochs(tmp_path):
    model = tiny.flex(tiny.settings(warmup=0.75))
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("hr_alpha")), with_kwargs=True)
    one = trainer(
        model, tmp_path, num_train_epochs=2, max_steps=-1, gradient_accumulation_steps=1
    )  # three steps an epoch
    one.train()
    assert seen == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    seen.clear()
    one.evaluate(Features(model, 2))
    assert seen == [None]  # what is asked later is answered with all of it


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


def test_the_loss_is_that_of_transformers():
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
        one = trainer(model, tmp_path)
        one.state.epoch = 0.2
        one.compute_loss(model.train(), next(iter(one.get_train_dataloader()))).backward()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == enabled
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("_proj_hd" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-12, atol=1e-14), name


@pytest.mark.slow
def test_mixed_precision_with_loss_scaling_learns_as_float32():
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


@pytest.mark.slow
def test_bfloat16_learns_on_the_cpu(checkpoint, files, tmp_path):
    outcome = train(
        *files,
        tmp_path,
        checkpoint,
        steps=6,
        batch_size=8,
        learning_rate=1e-2,
        device="cpu",
        precision="bfloat16",
    )
    assert outcome.losses[6] < 0.8 * outcome.losses[1]
    assert {weight.dtype for weight in weights(tmp_path).values()} == {torch.float32}
