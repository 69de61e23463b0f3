"""`flexattn train`: what is printed, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from refusals import refused
from training_data import record, train_on

from flexattn_cuda.runs import progress as report
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.tasks import training_data as data
from flexattn_cuda.tasks.options import SCHEDULES
from flexattn_cuda.tasks.train import FlexAttnTrainer, callbacks, trainer


def line(files: tuple[Path, Path], model: Path, output: Path) -> list:
    """The command line of a run."""
    data, images = files
    required = ["--data", data, "--images", images, "--output", output]
    return ["train", *required, "--model", model, "--device", "cpu"]


@pytest.mark.slow
def test_broken_records_are_counted_listed_and_left_out(flexattn, checkpoint, files, tmp_path):
    records = [
        *json.loads(files[0].read_text()),
        record("nowhere.png"),
        record("0.png", "<image>What?", " "),
        record("gone.png"),
    ]
    files[0].write_text(json.dumps(records))
    arguments = line(files, checkpoint, tmp_path / "out")
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
def test_an_image_that_is_deleted_during_a_run_does_not_end_it(checkpoint, files, tmp_path, monkeypatch, capsys):
    check = data.check

    def then_delete(*arguments):
        found = check(*arguments)
        (files[1] / "0.png").unlink()
        return found

    monkeypatch.setattr(data, "check", then_delete)
    outcome = train_on(files, tmp_path / "out", checkpoint, epochs=2, batch_size=4, device="cpu")
    assert len(outcome.losses) == 4
    assert capsys.readouterr().err.count("record 0: unreadable image: ") == 1
    assert json.loads((tmp_path / "out" / "broken.jsonl").read_text())["record"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
def test_the_loss_is_shown(flexattn, checkpoint, files, tmp_path, monkeypatch, terminal):
    monkeypatch.setattr(report, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "out"
    _, _, err = flexattn(*line(files, checkpoint, output), "--steps", 3)
    first, second, third = (float(row["loss"]) for row in csv.DictReader((output / "loss.csv").open()))
    assert f"{output}: loss {first:.4g} at step 1, {third:.4g} at step 3" in " ".join(err.split())
    assert f"loss {third if terminal else second:.4g}, " in err


@pytest.mark.parametrize(
    "options, says",
    [
        (["--batch-size", 0], "batch size is 0; it must be at least 1"),
        (["--epochs", 0], "epochs is 0.0; it must be more than 0"),
        (["--epochs", "inf"], "epochs is inf; it must be a finite number"),
        (["--learning-rate", "nan"], "learning rate is nan; it must be a finite number"),
        (["--learning-rate", "inf"], "learning rate is inf; it must be a finite number"),
        (["--seed", -1], "seed is -1; it must be at least 0"),
        (["--seed", 99999999999], "seed is 99999999999; it must be less than 4294967296"),
        (["--keep", 1], "keep is 1; it must be at least 2"),
        (["--save-every", 5, "--log-every", 2], "a checkpoint must fall on an entry of the loss"),
        (["--broken", "ignore"], "allowed: skip, refuse"),
        (["--optimizer", "best"], "optimizer is 'best'; allowed: "),
        (["--schedule", "best"], "schedule is 'best'; allowed: linear, "),
        (["--schedule", "cosine_with_min_lr"], "schedule is 'cosine_with_min_lr'; allowed: linear, "),
        (["--precision", "int8"], "precision is 'int8'; allowed: auto, float32"),
        (["--precision", "float16"], "mixed precision in float16 needs a GPU"),
        (["--train", "nothing"], "allowed: all, projector, hr"),
        (["--train", "hr", "--system", "llava"], "no projections for high-resolution tokens to train"),
        (["--system", "vit"], "there is no system 'vit'; allowed: llava, hd"),
        (["--max-length", 100000], "the model has 512 positions"),
        (["--max-length", 10], "all 8 records are broken"),
        (["--images", "nowhere"], "there is no folder nowhere of images"),
        (["--data", "nowhere.json"], "nowhere.json cannot be read"),
        (["--model", "nowhere"], "no checkpoint 'nowhere'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(flexattn, checkpoint, files, tmp_path, options, says):
    arguments = line(files, checkpoint, tmp_path / "out")
    code, out, err = flexattn(*arguments, *options)
    assert code == 2 and out == "" and says in err.splitlines()[-1]


def test_the_model_is_not_overwritten(flexattn, checkpoint, files):
    arguments = line(files, checkpoint, checkpoint / ".." / checkpoint.name)
    assert "is the folder of the model" in refused(flexattn(*arguments))
    assert not (checkpoint / "images.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_can_be_used(checkpoint, files, tmp_path, schedule):
    assert train_on(files, tmp_path, checkpoint, steps=1, schedule=schedule, device="cpu").losses.keys() == {1}


@pytest.mark.parametrize("missing", [ImportError, ValueError])
def test_an_optimizer_whose_package_is_missing_is_refused(flexattn, checkpoint, files, tmp_path, monkeypatch, missing):
    def find(*_):
        raise missing("install it\nwith pip")

    monkeypatch.setattr(FlexAttnTrainer, "get_optimizer_cls_and_kwargs", find)
    arguments = line(files, checkpoint, tmp_path / "out")
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

    monkeypatch.setattr(callbacks, "Progress", Shown)
    monkeypatch.setattr(trainer, "answer_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_on(files, tmp_path, checkpoint, steps=1, device="cpu", progress=True)
    assert not shown


@pytest.mark.parametrize("package", ["accelerate", "tensorboard"])
def test_a_missing_package_is_named(flexattn, checkpoint, files, tmp_path, monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name.startswith(package) else object())
    arguments = line(files, checkpoint, tmp_path / "out")
    code, _, err = flexattn(*arguments, "--tensorboard")
    assert code == 2 and f"need{'s' if package == 'accelerate' else ''} the package {package}: pip install" in err
