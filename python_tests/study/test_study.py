"""The study from its start to its report, with too little training to learn anything."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_study import photograph, read_csv
from typer.testing import CliRunner

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import lock
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.load import load
from studies.small import run
from studies.small.__main__ import app
from studies.small.collection import first_small_questions
from studies.small.finetuning import run_system
from studies.small.options import StudyOptions
from studies.small.outcomes import Answered
from studies.small.presets import PRESETS, SYSTEMS
from studies.small.questions import TASKS

ROOT = Path(__file__).parents[2]
CHOSEN = ("llava", "flexattn", "hd")
TINY = PRESETS["tiny"]


def started(photographs, output, *options, preset="tiny"):
    """Start the command in a process group of its own."""
    command = [sys.executable, "-m", "studies.small", "--photographs", photographs, "--output", output]
    command += ["--preset", preset, "--seeds", "0", "--systems", ",".join(CHOSEN), "--jobs", "1", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        start_new_session=True,
        # A background process ignores it. noqa: the test starts no threads.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


@pytest.fixture(scope="module")
def finished(photograph_folder, tmp_path_factory):
    """A study that was interrupted once, in the middle of the second system's fine-tuning, and resumed."""
    output = tmp_path_factory.mktemp("study")
    seed = output / "seed-0"
    first = started(photograph_folder, output)
    while not list(seed.glob("flexattn.checkpoints/checkpoint-*/complete.json")):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)  # as Ctrl-C does
    told = first.communicate(timeout=30)[1]
    assert first.returncode == 130 and "Traceback" not in told, told
    assert not (seed / "flexattn.json").exists()
    kept = [(path, path.stat().st_mtime_ns) for path in (seed / "llava.json", seed / "start")]
    shutil.copytree(seed, output / "seed-0-old")
    (output / "results" / "examples").mkdir(parents=True)
    (output / "results" / "examples" / "0000.png").touch()  # left by an earlier report
    second = started(photograph_folder, output, "--examples", "7,3")
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert "seed-0 flexattn: resuming from checkpoint-" in err and "llava: " not in err
    assert kept == [(path, path.stat().st_mtime_ns) for path, _ in kept]
    assert out.strip() == str(output / "results" / "report.html")
    return output


@pytest.mark.slow
def test_every_system_answers_the_same_questions(finished):
    answers = read_csv(finished / "results" / "answers.csv")
    asked = {system: [] for system in CHOSEN}
    for row in answers:
        asked[row["system"]].append((row["number"], row["question"], row["expected"]))
    assert all(asked[system] == asked["llava"] and len(asked[system]) == TINY.questions for system in asked)
    assert all(int(row["right"]) == (row["answer"] == row["expected"]) for row in answers)


@pytest.mark.slow
def test_the_report_shows_the_questions_that_were_chosen(finished):
    results = finished / "results"
    shown = json.loads((results / "examples.json").read_text())
    assert [one["file"] for one in shown] == ["examples/0007.png", "examples/0003.png"]
    assert {path.name for path in (results / "examples").iterdir()} == {"0003.png", "0007.png"}
    asked = {row["number"]: row["question"] for row in read_csv(results / "answers.csv")}
    assert [one["question"] for one in shown] == [asked["7"], asked["3"]]


def test_by_default_the_report_shows_the_first_questions_about_small_objects():
    answers = [
        Answered(number, TASKS[number % 5], ("small", "large")[number // 5 % 2], "What?", "yes", "no", 0)
        for number in range(40)
    ]
    assert first_small_questions(answers) == [0, 10, 1, 11, 2, 12, 3, 13, 4, 14]


@pytest.mark.slow
def test_a_resumed_system_equals_one_that_ran_through(finished, tmp_path):
    folder = tmp_path / "seed-0"
    folder.mkdir()
    for name in ("images.pt", "questions.pt", "start"):
        (folder / name).symlink_to(finished / "seed-0" / name)
    run_system(folder, 0, "flexattn", TINY, lambda text: None)
    once, resumed = (json.loads((seed / "flexattn.json").read_text()) for seed in (folder, finished / "seed-0"))
    assert len(once["losses"]) == TINY.steps
    for name in ("losses", "answers", "maps", "selected"):
        assert once[name] == resumed[name], name


@pytest.mark.slow
def test_trained_systems_answer_like_any_other_model(finished):
    for system in CHOSEN:
        model, processor = load(finished / "seed-0" / system, "cpu")
        assert model.config.system == system
        answering.ask(model, processor, photograph(0), "Is there a boat?", 3)


@pytest.mark.slow
def test_another_preset_is_refused(finished, photograph_folder):
    with pytest.raises(InputError, match="has another preset, other photographs or files of another version"):
        run.study(StudyOptions(photographs=[photograph_folder], output=finished, preset="small"))


@pytest.mark.slow
def test_other_photographs_are_refused_even_from_a_folder_of_the_same_name(finished, photograph_folder, tmp_path):
    others = tmp_path / photograph_folder.name
    others.mkdir()
    for number in range(8):
        photograph(8 + number).save(others / f"{number}.jpg")
    with pytest.raises(InputError, match="has another preset, other photographs or files of another version"):
        run.study(StudyOptions(photographs=[others], output=finished, preset="tiny"))


def test_a_study_with_files_of_another_version_is_refused(photograph_folder, tmp_path):
    """Its images and questions are pickles of classes that may have changed since."""
    options = StudyOptions(photographs=[photograph_folder], output=tmp_path, preset="tiny")
    run._check_settings(options)
    run._check_settings(options)  # the same version may resume
    settings = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps(settings | {"format": settings["format"] - 1}))
    with pytest.raises(InputError, match="has another preset, other photographs or files of another version"):
        run._check_settings(options)


def test_a_damaged_photograph_is_refused_before_any_work(photograph_folder, tmp_path):
    for number in range(8):
        shutil.copy(photograph_folder / f"{number}.jpg", tmp_path)
    (tmp_path / "0.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:300])
    with pytest.raises(InputError, match="the photograph .*0.jpg is damaged or cannot be read"):
        run.study(StudyOptions(photographs=[tmp_path], output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_takes_one_study_at_a_time(photograph_folder, tmp_path):
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        lock(other, tmp_path)
        with pytest.raises(InputError, match="another run is writing"):
            run.study(StudyOptions(photographs=[photograph_folder], output=tmp_path, preset="tiny"))
    finally:
        os.close(other)


@pytest.mark.slow
def test_the_processes_of_a_killed_study_end(photograph_folder, tmp_path):
    study = started(photograph_folder, tmp_path / "out", preset="small")
    try:
        while "seed-0 start: encoder" not in study.stderr.readline():  # which takes minutes
            assert study.poll() is None
        study.kill()
        study.communicate(timeout=30)  # until none of its processes holds the pipes
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)


def killed(*_):
    """A unit whose process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_process_is_reported_in_one_sentence(photograph_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_run_unit", killed)
    with pytest.raises(InputError, match="a process of the study was killed"):
        run.study(
            StudyOptions(photographs=[photograph_folder], output=tmp_path / "out", preset="tiny", seeds="0", jobs=1)
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preset": "large"}, "preset is 'large'; allowed: "),
        ({"systems": "llava,flex"}, "--systems has 'flex'; allowed with --preset small: all, or some of llava, "),
        ({"systems": ""}, "--systems has ''; allowed"),
        ({"seeds": "0,x"}, "--seeds is '0,x'; give comma-separated numbers"),
        ({"seeds": ""}, "--seeds is ''; give comma-separated numbers"),
        ({"jobs": 0}, "jobs is 0; it must be at least 1"),
        ({"preset": "tiny", "examples": "3,20"}, "--examples has 20; the preset 'tiny' has the questions 0 to 19"),
        ({"examples": "all"}, "--examples is 'all'; give comma-separated numbers"),
    ],
)
def test_options_that_are_not_allowed_are_refused(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        StudyOptions(photographs=[tmp_path], output=tmp_path / "out", **options)


def test_the_command_has_the_options_of_the_dataclass(monkeypatch, tmp_path):
    studies = []
    monkeypatch.setattr(run, "study", lambda options, command, progress: studies.append(options))
    arguments = "--photographs a --photographs b -o out --seeds 3,1,3 --systems hd,llava --jobs 2 --examples 5"
    for given in (arguments, "--photographs a --output out"):
        result = CliRunner().invoke(app, given.split())
        assert result.exit_code == 0, result.output
    chosen = StudyOptions(
        photographs=[Path("a"), Path("b")],
        output=Path("out"),
        preset="small",
        seeds="3,1,3",
        systems="hd,llava",
        jobs=2,
        examples="5",
    )
    assert studies == [chosen, StudyOptions(photographs=[Path("a")], output=Path("out"))]
    assert (chosen.seed_numbers, chosen.system_names, chosen.example_numbers) == ([3, 1], ["hd", "llava"], [5])
    assert (studies[1].seed_numbers, studies[1].system_names) == ([0, 1, 2], list(SYSTEMS))
    assert studies[1].example_numbers is None
