"""The training of the default model: a stage goes on where it was stopped, and all stages leave a checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from documents import ROOT
from small_study import read_csv
from torch import nn

import flexattn_cuda
from studies.default_model.evaluation import conditions
from studies.default_model.fonts import FONTS, HELD_OUT_FONTS
from studies.default_model.questions import NONE, TASKS
from studies.small.stage import Stage, train_stage


class Regression(Stage):
    """Fits a matrix to random ones, which depend on the step alone; may end early, as Ctrl-C would end it."""

    name, log_every = "regression", 2

    def __init__(self, stop_before: int | None = None):
        torch.manual_seed(0)
        self.layer, self.stop_before = nn.Linear(4, 3), stop_before
        self.parameters = dict(self.layer.named_parameters())

    def loss(self, step: int) -> torch.Tensor:
        if step == self.stop_before:
            raise KeyboardInterrupt
        torch.manual_seed(step)
        return (self.layer(torch.randn(8, 4)) - torch.randn(8, 3)).square().mean()

    def summary(self) -> str:
        return ""


@pytest.mark.parametrize("stop_before", [2, 3, 6])
def test_a_stage_goes_on_where_it_was_stopped(tmp_path, stop_before):
    whole, stopped, resumed = Regression(), Regression(stop_before), Regression()
    train_stage(whole, 7)
    with pytest.raises(KeyboardInterrupt):
        train_stage(stopped, 7, tmp_path / "keep.pt")
    assert (tmp_path / "keep.pt").exists() == (stop_before > 2), "written with every second step"
    train_stage(resumed, 7, tmp_path / "keep.pt")
    assert not list(tmp_path.iterdir())
    for name, expected in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], expected)


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """A folder with a file for every font, all of them DejaVu Sans, which Matplotlib brings."""
    font_manager = pytest.importorskip("matplotlib.font_manager")
    folder = tmp_path_factory.mktemp("fonts")
    for name in (*FONTS, *HELD_OUT_FONTS):
        shutil.copy(font_manager.findfont("DejaVu Sans"), folder / name)
    return folder


def test_each_condition_asks_what_it_says(fonts, photographs):
    for condition in conditions([fonts]):
        asked = list(condition.asked(photographs, 3))
        assert [one.question for one in asked] == [one.question for one in condition.asked(photographs, 3)]
        for one in asked:
            assert (one.answer == NONE) == (condition.task == "absent")
            assert condition.task in TASKS and one.question and one.answer
            if condition.phrases:
                assert any(
                    one.question.split("{c}")[0][:5] == phrase.format(c="red")[:5] for phrase in condition.phrases
                )


@pytest.mark.slow
def test_all_stages_leave_a_model_and_its_results(fonts, photograph_folder, tmp_path):
    steps = ("--encoder-steps", "3", "--localise-steps", "3", "--answer-steps", "3", "--steps", "3")
    command = [
        *(sys.executable, "-m", "studies.default_model", "--systems", "attention,none", "--threads", "1"),
        *("--photographs", str(photograph_folder), "--fonts", str(fonts)),
        *("--output", str(tmp_path / "model"), "--work", str(tmp_path / "work")),
        *(*steps, "--images", "40", "--held-out", "1"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    results = read_csv(tmp_path / "work" / "default_model.csv")
    systems = ["attention"] * len(conditions([fonts])) + ["HR off", "none"]
    assert [row["system"] for row in results] == systems
    model, processor = flexattn_cuda.load(tmp_path / "model", "cpu")
    answer = flexattn_cuda.ask(model, processor, photograph_folder / "0.jpg", "What nubmer is on the red sign?")
    assert isinstance(answer.text, str)
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "model")
    subprocess.run(command, cwd=ROOT, check=True)  # nothing is trained again
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
