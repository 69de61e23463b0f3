"""`train`: runs that were interrupted are resumed, processes agree, and what is trained is what is said."""

from __future__ import annotations

import fcntl
import math
import os
import random
import signal
import subprocess
import time

import pytest
import torch
from train_runs import command, environment, furthest, weights
from training_data import save_preset, train_on

from flexattn_cuda.errors import InputError
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.load import load
from flexattn_cuda.tasks.options import ENDLESS_SCHEDULES
from flexattn_cuda.tasks.train import answer_loss, last_complete_checkpoint, trainer

SGD = dict(optimizer="sgd", schedule="constant", learning_rate=0.5, precision="float64", device="cpu")


@pytest.mark.slow
def test_a_run_killed_at_random_and_resumed_equals_an_uninterrupted_one(checkpoint, files, tmp_path):
    settings = dict(steps=20, save_every=2, batch_size=2, accumulate=2, learning_rate=1e-2, seed=3, device="cpu")
    whole = train_on(files, tmp_path / "whole", checkpoint, **settings)
    assert whole.losses.keys() == set(range(1, 21)) and whole.losses[20] < whole.losses[1]

    output = tmp_path / "killed"
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    required = ["--data", files[0], "--images", files[1], "--output", output]
    started = command(*required, "--model", checkpoint, *options)
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

    resumed = train_on(files, output, checkpoint, **settings)
    assert resumed.losses == whole.losses
    assert (output / "loss.csv").read_text() == (tmp_path / "whole" / "loss.csv").read_text()
    assert furthest(weights(output), weights(tmp_path / "whole")) == 0


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_passed_over(checkpoint, files, tmp_path):
    settings = dict(steps=6, save_every=2, batch_size=4, learning_rate=1e-2, device="cpu", keep=3)
    whole = train_on(files, tmp_path, checkpoint, **settings)
    expected = weights(tmp_path)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "complete.json"):
        path = tmp_path / "checkpoint-6" / name
        path.write_bytes(path.read_bytes()[:-7])
        assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
        assert train_on(files, tmp_path, checkpoint, **settings).losses == whole.losses
        assert furthest(weights(tmp_path), expected) == 0
    (tmp_path / "checkpoint-6" / "scheduler.pt").unlink()
    (tmp_path / "checkpoint-4" / "complete.json").unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.slow
def test_a_finished_run_is_not_trained_further(checkpoint, files, tmp_path):
    settings = dict(steps=2, batch_size=4, learning_rate=1e-2, device="cpu")
    outcome, trained = train_on(files, tmp_path, checkpoint, **settings), weights(tmp_path)
    assert train_on(files, tmp_path, checkpoint, **settings) == outcome
    assert furthest(weights(tmp_path), trained) == 0


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ENDLESS_SCHEDULES)
def test_a_finished_run_trained_further_equals_a_longer_one(checkpoint, files, tmp_path, schedule):
    settings = dict(batch_size=4, learning_rate=1e-2, device="cpu", schedule=schedule, warmup_steps=1)
    whole = train_on(files, tmp_path / "whole", checkpoint, **settings, steps=5)
    train_on(files, tmp_path / "parts", checkpoint, **settings, steps=2)
    assert train_on(files, tmp_path / "parts", checkpoint, **settings, steps=5).losses == whole.losses
    assert furthest(weights(tmp_path / "parts"), weights(tmp_path / "whole")) == 0


@pytest.mark.slow
def test_a_run_whose_learning_rate_follows_its_length_is_not_trained_further(checkpoint, files, tmp_path):
    settings = dict(batch_size=4, device="cpu")
    train_on(files, tmp_path, checkpoint, **settings, steps=1)
    with pytest.raises(
        InputError, match=rf"\(steps\); repeat them .* start another from it with --model {tmp_path}, or"
    ):
        train_on(files, tmp_path, checkpoint, **settings, steps=2)


@pytest.mark.slow
def test_a_run_with_other_options_is_refused_unless_it_is_restarted(checkpoint, files, tmp_path):
    settings = dict(steps=2, batch_size=4, device="cpu")
    train_on(files, tmp_path, checkpoint, **settings, learning_rate=1e-3)
    with pytest.raises(InputError, match=r"was started with other options \(learning rate, seed\); .* --restart"):
        train_on(files, tmp_path, checkpoint, **settings, learning_rate=1e-2, seed=1)
    again = train_on(files, tmp_path, checkpoint, **settings, learning_rate=1e-2, seed=1, restart=True)
    assert len(again.losses) == 2


@pytest.mark.slow
def test_a_run_is_resumed_only_with_the_records_and_images_it_was_started_with(checkpoint, files, tmp_path):
    settings = dict(model=checkpoint, steps=1, batch_size=4, device="cpu")
    output = tmp_path / "out"
    train_on(files, output, **settings)
    moved = files[1].rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"was started with other options \(images\); "):
        train_on((files[0], moved), output, **settings)
    files[1].symlink_to(moved)
    with pytest.raises(InputError, match=r"was started with other options \(images\); "):
        train_on(files, output, **settings)
    files[1].unlink()
    moved.rename(files[1])
    (files[1] / "2.png").rename(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"with other options \(content of images, set of broken records\); "):
        train_on(files, output, **settings)
    (tmp_path / "2.png").rename(files[1] / "2.png")
    train_on(files, output, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("content", ['{"a": ', "[]", "null", "\udcff"])
def test_a_damaged_file_of_options_is_refused(checkpoint, files, tmp_path, content):
    (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="run.json does not hold the options of a run; .* --restart"):
        train_on(files, tmp_path, checkpoint, steps=1, device="cpu")
    train_on(files, tmp_path, checkpoint, steps=1, device="cpu", restart=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "log_every, step, whole", [(1, 3, "the last complete checkpoint is .*checkpoint-2$"), (4, 3, "no checkpoint")]
)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_or_infinite_loss_ends_the_run_before_it_is_saved(
    checkpoint, files, tmp_path, monkeypatch, log_every, step, whole, what
):
    losses = []

    def third_is_wrong(*arguments, **options):
        loss = answer_loss(*arguments, **options)
        losses.append(loss.item())
        if len(losses) == 3 and what == "gradient":
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss * math.nan if len(losses) == 3 and what == "loss" else loss

    monkeypatch.setattr(trainer, "answer_loss", third_is_wrong)
    with pytest.raises(InputError, match=f"the loss of step {step} or its gradient is NaN or infinite; .*{whole}"):
        train_on(files, tmp_path, checkpoint, steps=3, save_every=log_every, log_every=log_every, device="cpu")
    assert not (tmp_path / "checkpoint-3").exists() and not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(checkpoint, files, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # as the other run does
    with pytest.raises(InputError, match=f"another run is writing {tmp_path}"):
        train_on(files, tmp_path, checkpoint, steps=1, device="cpu")
    os.close(folder)
    train_on(files, tmp_path, checkpoint, steps=1, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("preset, batch", [("released", 2), ("paper", 1)])
def test_two_processes_train_like_one_with_twice_the_batch(files, tmp_path, preset, batch):
    """One record at a time: now and then a process has no image at all."""
    checkpoint = save_preset(tmp_path / "model", preset)
    options = [part for name, value in SGD.items() for part in (f"--{name.replace('_', '-')}", value)]
    options += ["--data", files[0], "--images", files[1], "--model", checkpoint, "--steps", 20, "--batch-size", batch]
    ran = subprocess.run(
        command(*options, "--output", tmp_path / "two", processes=2),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    train_on(files, tmp_path / "one", checkpoint, steps=20, batch_size=2 * batch, **SGD)
    one, two, begun = (weights(folder) for folder in (tmp_path / "one", tmp_path / "two", checkpoint))
    assert furthest(one, two) <= 1e-8
    assert all((one[name] - begun[name]).abs().max() > 1e-4 for name in one if "_proj_hd" in name)


@pytest.mark.slow
def test_accumulated_batches_train_like_one_batch(checkpoint, files, tmp_path):
    train_on(files, tmp_path / "parts", checkpoint, steps=6, batch_size=1, accumulate=4, **SGD)
    train_on(files, tmp_path / "whole", checkpoint, steps=6, batch_size=4, **SGD)
    assert furthest(weights(tmp_path / "parts"), weights(tmp_path / "whole")) <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("system", [None, "llava", "hd", "xattn"])
def test_every_system_learns_and_answers(checkpoint, files, tmp_path, system):
    outcome = train_on(
        files,
        tmp_path / "out",
        checkpoint,
        system=system,
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
    answering.ask(model, processor, files[1] / "0.png", "Which digits stand on the red sign?", max_new_tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, trained", [("all", "vision_tower"), ("projector", "multi_modal_projector"), ("hr", "_proj_hd")]
)
def test_only_the_named_part_is_trained(checkpoint, files, tmp_path, part, trained):
    train_on(files, tmp_path, checkpoint, steps=2, batch_size=8, learning_rate=1e-2, device="cpu", train=part)
    before, after = weights(checkpoint), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    named = {name for name in before if trained in name}
    if part == "all":
        assert changed and not changed & named
    else:
        assert changed == named


@pytest.mark.slow
def test_bfloat16_learns_on_the_cpu(checkpoint, files, tmp_path):
    outcome = train_on(
        files, tmp_path, checkpoint, steps=6, batch_size=8, learning_rate=1e-2, device="cpu", precision="bfloat16"
    )
    assert outcome.losses[6] < 0.8 * outcome.losses[1]
    assert {weight.dtype for weight in weights(tmp_path).values()} == {torch.float32}
