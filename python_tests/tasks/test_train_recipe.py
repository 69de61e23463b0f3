"""`flexattn train --recipe paper`: section 5.2 for every system, what it refuses, and what it predicts."""

from __future__ import annotations

import json
import re

import pytest
from refusals import refused
from training_data import record, train_on

from flexattn_cuda.errors import InputError
from flexattn_cuda.mechanism.config import SYSTEMS
from flexattn_cuda.tasks.options import RECIPES, TrainOptions
from flexattn_cuda.tasks.train.arguments import training_arguments
from flexattn_cuda.tasks.train.requirements import Machine
from flexattn_cuda.tasks.train.run import TrainingRun

PLACES = dict(data="d", images="i", output="o")


def options(**given) -> TrainOptions:
    return TrainOptions(**PLACES, recipe="paper", **given)


def test_the_recipe_is_that_of_section_5_2(tmp_path):
    recipe = RECIPES["paper"]
    assert (recipe.epochs, recipe.records_per_step, recipe.learning_rate) == (1.0, 1152, 2e-5)
    chosen = TrainOptions(data="d", images="i", output=tmp_path, recipe="paper", batch_size=4)
    arguments = training_arguments(chosen, Machine(on_cpu=True, precision="float32"))
    assert arguments.num_train_epochs == 1 and arguments.max_steps == -1
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 1152
    assert arguments.learning_rate == 2e-5 and arguments.lr_scheduler_type == "cosine"


@pytest.mark.parametrize("batch_size, processes, batches", [(4, 1, 288), (4, 8, 36), (8, 144, 1), (1152, 1, 1)])
def test_batches_are_accumulated_to_1152_records(batch_size, processes, batches):
    assert options(batch_size=batch_size).accumulated_batches(processes) == batches
    assert options(batch_size=batch_size, accumulate=batches).accumulated_batches(processes) == batches


@pytest.mark.parametrize(
    "given, processes", [({"batch_size": 5}, 1), ({}, 5), ({"accumulate": 2}, 1), ({"batch_size": 2304}, 1)]
)
def test_batches_that_do_not_make_up_1152_records_are_refused(given, processes):
    with pytest.raises(InputError, match=f"1152 records per step, .* on {processes} processes.*leave --accumulate out"):
        options(**given).accumulated_batches(processes)


def test_without_a_recipe_one_batch_is_a_step():
    assert TrainOptions(**PLACES).accumulated_batches(3) == 1
    assert TrainOptions(**PLACES, accumulate=7).accumulated_batches(3) == 7


def test_options_that_say_what_the_recipe_says_are_taken():
    options(epochs=1.0, learning_rate=2e-5, schedule="cosine", train="all")


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.slow
def test_every_system_is_trained_but_for_its_tower(checkpoint, files, tmp_path, system):
    """Eight records are one step; the tower stays as it is, and every other part moves."""
    run = TrainingRun(
        TrainOptions(
            data=files[0], images=files[1], output=tmp_path, model=str(checkpoint), system=system, recipe="paper",
            device="cpu",
        )
    )  # fmt: skip
    with run:
        run.prepare()
        before = {name: weight.detach().clone() for name, weight in run._model.named_parameters()}
        checked = run.check()
        assert list(run.fit(run.resume(checked), checked.broken)) == [1]
        after = dict(run._model.named_parameters())
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and not any("vision_tower" in name for name in moved)
    parts = ["language_model", "multi_modal_projector"]
    assert all(any(part in name for name in moved) for part in parts), sorted(moved)


@pytest.mark.slow
def test_a_step_of_the_recipe_is_a_step_of_the_same_options(checkpoint, files, tmp_path):
    given = dict(batch_size=4, device="cpu")
    by_recipe = train_on(files, tmp_path / "a", checkpoint, recipe="paper", **given)
    by_hand = train_on(files, tmp_path / "b", checkpoint, epochs=1.0, accumulate=288, **given)
    assert by_recipe.losses == by_hand.losses


def test_checking_the_data_prints_the_prediction(flexattn, checkpoint, files, tmp_path):
    files[0].write_text(json.dumps([*json.loads(files[0].read_text()), record("nowhere.png")]))
    places = ["--data", files[0], "--images", files[1], "--output", tmp_path / "out", "--model", checkpoint]
    code, _, err = flexattn("train", *places, "--recipe", "paper", "--check-only", "--device", "cpu")
    assert code == 0
    said = (
        "recipe paper (section 5.2): epochs 1, records 8, steps 1; a step of 1152 records is processes 1 x batches 288 "
        "x records 4"
    )
    assert said in err
    for gpu in ("V100 32 GB", "H100 80 GB"):
        assert re.search(rf"predicted, not measured: \S+ GPU-hours of {gpu}; on 1, the fewest, \S+ hours", err)


@pytest.mark.parametrize(
    "given, said",
    [
        (["--epochs", 2], "--recipe paper says --epochs 1.0, not 2.0; leave one of --recipe and --epochs out"),
        (["--learning-rate", 1e-3], "--recipe paper says --learning-rate 2e-05, not 0.001"),
        (["--schedule", "linear"], "--recipe paper says --schedule cosine, not linear"),
        (["--train", "hr"], "--recipe paper says --train all, not hr"),
        (["--steps", 3], "--recipe paper has no steps; leave one of --recipe and --steps out"),
        (["--lora", 8], "--recipe paper has no lora; leave one of --recipe and --lora out"),
        (["--adapter-only"], "--recipe paper trains the model; leave one of --recipe and --adapter-only out"),
        (["--batch-size", 7], "takes 1152 records per step, which --batch-size 7 on 1 processes cannot make up"),
        (["--recipe", "papers"], "recipe is 'papers'; allowed: paper"),
    ],
)
def test_what_contradicts_the_recipe_is_refused(flexattn, checkpoint, files, tmp_path, given, said):
    places = ["--data", files[0], "--images", files[1], "--output", tmp_path / "out", "--model", checkpoint]
    assert said in refused(flexattn("train", *places, "--device", "cpu", "--recipe", "paper", *given))
