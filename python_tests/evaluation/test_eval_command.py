"""`flexattn eval` with the model that ships with the package: resumed, by two processes, and refused."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
from pathlib import Path

import evaluation_data
import pytest
from datasets import Dataset
from eval_runs import ENCODED, TIMES, Command, answered, costs, files, lines, write_data

import flexattn_cuda
from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation.data import SHORT_ANSWER
from flexattn_cuda.tasks.cropping import Cropper
from flexattn_cuda.tasks.options import EvalOptions

pytestmark = [pytest.mark.slow, pytest.mark.harness]

SYSTEMS, TASKS = ("flexattn", "crop"), ("vstar_bench_loss", "rsvqa_hrben", "pope")


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.fail("lmms-eval is not installed; pip install 'flexattn_cuda[eval]', or pass -m 'not harness'")


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Command:
    return Command(SYSTEMS, TASKS, write_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def data(command) -> Path:
    return command.data


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    """The output of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    command.run(output)
    return output


def test_the_results_are_written_beside_the_papers(undisturbed):
    names = files(undisturbed)
    assert {"results.csv", "table_1.csv", "table_2.csv", "table_3.csv"} < set(names)
    assert {f"samples/{system}/{task}.jsonl" for system in SYSTEMS for task in TASKS} < set(names)
    [flexattn, crop] = csv.DictReader(names["table_1.csv"].decode().splitlines())
    assert (flexattn["V* overall published"], crop["V* overall published"]) == ("54.5", "")
    assert float(flexattn["V* overall low"]) <= float(flexattn["V* overall"]) <= float(flexattn["V* overall high"])
    page = (undisturbed / "report.html").read_text()
    assert all(f'src="{name}"' in page for name in names if name.startswith("pictures/")) and "pictures/" in page


def test_an_image_with_ten_questions_is_encoded_once(undisturbed):
    found = {(row["system"], row["task"]): row for row in costs(undisturbed)}
    for system, crops in (("flexattn", 0), ("crop", 1)):
        row = found[system, "rsvqa_hrben"]
        assert (row["documents"], row["images_encoded"]) == ("30", str(3 + 30 * crops))
        # Two images and three questions, with eight options.
        assert found[system, "vstar_bench_loss"]["images_encoded"] == str(2 + 3 * crops)
    assert found["flexattn", "rsvqa_hrben"]["tiles_encoded"] == "27" and found["crop", "pope"]["selected"] == ""
    assert float(found["flexattn", "pope"]["selected"]) > 0 and 0 < float(found["flexattn", "pope"]["tiles"]) <= 9


def test_the_crop_system_answers_as_a_loop_over_the_questions(undisturbed, command):
    cropper = Cropper.of(None, *flexattn_cuda.load(None, "cpu", system="llava"))
    records = [json.loads(line) for line in (undisturbed / "samples" / "crop" / "pope.jsonl").open()]
    rows = Dataset.from_parquet(str(command.data / "lmms-lab-encoder/POPE/data/*.parquet"), cache_dir=str(undisturbed))
    said = [
        cropper.ask(row["image"], f"{row['question']}\n{SHORT_ANSWER}", max_new_tokens=128).text.lower() for row in rows
    ]
    assert [one["answers"][0].lower() for one in records] == said and len(said) == 8


def test_a_run_that_is_killed_at_any_moment_is_resumed(undisturbed, command, tmp_path):
    """Killed at a random line of its journals, and again while it is resumed; no request is answered twice."""
    output, most = tmp_path / "out", lines(undisturbed) // 3
    at = command.run_killed(output, [random.SystemRandom().randint(1, most) for _ in range(2)])
    assert files(output) == files(undisturbed), at
    assert costs(output, TIMES + ENCODED) == costs(undisturbed, TIMES + ENCODED)
    assert answered(output) == answered(undisturbed) and len(set(answered(output))) == len(answered(output))


def test_two_processes_give_what_one_gives(undisturbed, command, tmp_path):
    command.run(tmp_path / "out", processes=2)
    assert files(tmp_path / "out") == files(undisturbed)
    assert costs(tmp_path / "out", TIMES) == costs(undisturbed, TIMES)


def test_what_no_judge_scores_is_written_unscored(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    evaluation_data.write_mmvet(tmp_path / "data")
    [result] = evaluate(tmp_path, tmp_path / "data", tasks="mmvet", progress=True, max_new_tokens=4)
    assert result.metrics == {} and result.cost.documents == 2
    records = [json.loads(line) for line in (tmp_path / "out" / "samples" / "llava" / "mmvet.jsonl").open()]
    assert [(one["doc_id"], one["target"]) for one in records] == [(0, "a sign <AND> 42"), (1, "a sign <AND> 42")]
    assert all(isinstance(answer, str) for one in records for answer in one["answers"])
    assert "the answers to mmvet are written unscored" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- refusals


def evaluate(tmp_path: Path, folder: Path, progress: bool = False, **options):
    from flexattn_cuda.evaluation.run import evaluate as run

    given = {"output": tmp_path / "out", "systems": "llava", "data": folder, "device": "cpu"} | options
    return run(EvalOptions(**given), progress)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"systems": "llava,lava"}, "there is no system 'lava'; allowed: llava, hd"),
        ({"tasks": "popp"}, "there is no single task 'popp'; `lmms-eval tasks list`"),
        ({"tasks": "pope,,mme"}, "it must be names of tasks, separated by commas"),
        ({"tasks": "gqa"}, "the task gqa reads lmms-lab-encoder/GQA, and there is no folder .*; copy"),
        ({"tasks": "gqa_map"}, "there is no folder .*gqa_map; FLEXATTN_DATA must name"),
        ({"data": "nowhere"}, "there is no folder nowhere; --data must name"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path, data, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, data, **options)


def test_data_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    evaluation_data.write_benchmarks(tmp_path / "data", lambda row: "42")
    pope = tmp_path / "data" / "lmms-lab-encoder" / "POPE" / "data"
    [file] = pope.iterdir()
    textvqa = tmp_path / "data" / "lmms-lab-encoder" / "textvqa" / "data"
    [other] = textvqa.iterdir()
    file.write_bytes(other.read_bytes())  # rows of another benchmark
    with pytest.raises(InputError, match="the data of the task pope (has another format|cannot be read)"):
        evaluate(tmp_path, tmp_path / "data", tasks="pope")
