"""The study from its start to its report, with so little training that nothing is learned."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_study_scenes import photograph

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import lock
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.load import load
from studies.small import collection, run
from studies.small.finetuning import run_system
from studies.small.scenes import TASKS

ROOT = Path(__file__).parents[2]
SYSTEMS = "llava,flexattn,hd"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(8):
        photograph(number).save(folder / f"{number}.jpg")
    return folder


def started(photographs, output, *options, preset="tiny"):
    """The command in a group of processes of its own."""
    command = [sys.executable, "-m", "studies.small", "--photographs", photographs, "--output", output, "--preset", preset,
               "--seeds", "0", "--systems", SYSTEMS, "--jobs", "1", *options]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the background ignores it
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(photographs, tmp_path_factory):
    """A study that was interrupted once, in the middle of the second system's fine-tuning."""
    output = tmp_path_factory.mktemp("study")
    seed = output / "seed-0"
    first = started(photographs, output)
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
    (output / "results" / "examples" / "0000.png").touch()  # of an earlier report
    second = started(photographs, output, "--examples", "7,3")
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert "seed-0 flexattn: goes on from checkpoint-" in err and "llava: " not in err
    assert kept == [(path, path.stat().st_mtime_ns) for path, _ in kept]
    assert out.strip() == str(output / "results" / "report.html")
    return output


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_system_answers_the_same_questions(finished):
    answers = rows(finished / "results" / "answers.csv")
    asked = {system: [] for system in SYSTEMS.split(",")}
    for row in answers:
        asked[row["system"]].append((row["number"], row["question"], row["expected"]))
    assert all(
        asked[system] == asked["llava"] and len(asked[system]) == run.PRESETS["tiny"].questions for system in asked
    )
    assert all(int(row["right"]) == (row["answer"] == row["expected"]) for row in answers)


def test_the_report_shows_the_questions_that_were_chosen(finished):
    results = finished / "results"
    shown = json.loads((results / "examples.json").read_text())
    assert [one["file"] for one in shown] == ["examples/0007.png", "examples/0003.png"]
    assert {path.name for path in (results / "examples").iterdir()} == {"0003.png", "0007.png"}
    asked = {row["number"]: row["question"] for row in rows(results / "answers.csv")}
    assert [one["question"] for one in shown] == [asked["7"], asked["3"]]


def test_by_default_the_report_shows_the_first_questions_about_small_objects():
    answers = [
        {"number": number, "task": TASKS[number % 5], "size": ("small", "large")[number // 5 % 2]}
        for number in range(40)
    ]
    assert collection.first_about_small_objects(answers) == [0, 10, 1, 11, 2, 12, 3, 13, 4, 14]


@pytest.mark.slow
def test_what_was_interrupted_ends_as_if_it_had_not_been(finished, photographs, tmp_path):
    """The start of the killed study, and one that ran through, give the same model."""
    folder = tmp_path / "seed-0"
    folder.mkdir()
    for name in ("images.pt", "questions.pt", "start"):
        (folder / name).symlink_to(finished / "seed-0" / name)
    run_system(folder, 0, "flexattn", run.PRESETS["tiny"], lambda text: None)
    once, killed = (json.loads((place / "flexattn.json").read_text()) for place in (folder, finished / "seed-0"))
    assert len(once["losses"]) == run.PRESETS["tiny"].steps
    for name in ("losses", "answers", "maps", "selected"):
        assert once[name] == killed[name], name


def test_trained_systems_answer_like_any_other_model(finished):
    for system in SYSTEMS.split(","):
        model, processor = load(finished / "seed-0" / system, "cpu")
        assert model.config.system == system
        answering.ask(model, processor, photograph(0), "Is there a boat?", 3)


def test_another_preset_is_refused(finished, photographs):
    with pytest.raises(InputError, match="begun with another preset or other photographs"):
        run.study(finished, [photographs], "small")


def test_other_photographs_are_refused_also_from_a_folder_of_the_same_name(finished, photographs, tmp_path):
    others = tmp_path / photographs.name
    others.mkdir()
    for number in range(8):
        photograph(8 + number).save(others / f"{number}.jpg")
    with pytest.raises(InputError, match="begun with another preset or other photographs"):
        run.study(finished, [others], "tiny")


def test_a_damaged_photograph_is_refused_before_anything_is_begun(photographs, tmp_path):
    for number in range(8):
        shutil.copy(photographs / f"{number}.jpg", tmp_path)
    (tmp_path / "0.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:300])
    with pytest.raises(InputError, match="the photograph .*0.jpg is damaged or cannot be read"):
        run.study(tmp_path / "out", [tmp_path])
    assert not (tmp_path / "out").exists()


def test_one_study_at_a_time_in_a_folder(photographs, tmp_path):
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        lock(other, tmp_path)
        with pytest.raises(InputError, match="another run is writing"):
            run.study(tmp_path, [photographs], "tiny")
    finally:
        os.close(other)


@pytest.mark.slow
def test_its_processes_end_with_a_study_that_is_killed(photographs, tmp_path):
    study = started(photographs, tmp_path / "out", preset="small")
    try:
        while "seed-0 start: encoder" not in study.stderr.readline():  # which takes minutes
            assert study.poll() is None
        study.kill()
        study.communicate(timeout=30)  # until none of its processes holds the pipes
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)


def killed(*_):
    """A unit whose process the system ends."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_process_is_told_in_one_sentence(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_unit", killed)
    with pytest.raises(InputError, match="a process of the study was killed"):
        run.study(tmp_path / "out", [photographs], "tiny", seeds=[0], jobs=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preset": "large"}, "the preset is 'large'; allowed: tiny, small"),
        ({"systems": ["flex"]}, "there is no system 'flex' in the study; allowed: llava, "),
        ({"seeds": []}, "a study needs a seed"),
        ({"jobs": 0}, "the number of jobs is 0"),
        (
            {"preset": "tiny", "examples": [3, 20]},
            "there is no question 20; the preset .tiny. has 20, numbered from 0",
        ),
    ],
)
def test_bad_input(options, message, photographs, tmp_path):
    with pytest.raises(InputError, match=message):
        run.study(tmp_path / "out", [photographs], **options)
    assert not (tmp_path / "out").exists()


def test_too_few_photographs(tmp_path):
    with pytest.raises(InputError, match="found 0 photographs"):
        run.study(tmp_path / "out", [tmp_path])
