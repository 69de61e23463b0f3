"""`flexattn eval` with the model that ships with the package: resumed, by two processes, and refused."""

from __future__ import annotations

import csv
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import evaluation_data
import pytest

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.records import from_line
from flexattn_cuda.tasks.options import EvalOptions

pytestmark = [pytest.mark.slow, pytest.mark.harness]

SYSTEMS, TASKS = ("flexattn", "llava"), ("vstar_bench_loss", "rsvqa_hrben", "pope")
# In the words of that model. The first question of each category is about the same image.
VSTAR = {
    "direct_attributes": [
        ("What does the sign say that is red?", ["89", "1 7", "4"]),
        ("Which digits are on the sign that is blue?", ["23", "5"]),
    ],
    "relative_position": [("What does the sign say that is black?", ["7", "70", "8 8"])],
}
TIMES = ("seconds", "seconds_per_document")
ENCODED = ("images_encoded", "tiles_encoded")  # a run that is resumed encodes the images of its last chunk again


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.fail("lmms-eval is not installed; pip install 'flexattn_cuda[eval]', or pass -m 'not harness'")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with V* Bench, RSVQA (ten questions about each of three images) and POPE."""
    folder = tmp_path_factory.mktemp("data")
    evaluation_data.write_vstar(folder / "vstar_bench", VSTAR)
    evaluation_data.write_rsvqa(folder / "rsvqa_hrben", kinds=("presence", "comp") * 15, per_image=10)
    evaluation_data.write_benchmarks(folder, lambda row: "42")
    return folder


def start(data: Path, output: Path, processes: int = 1) -> subprocess.Popen[str]:
    """Start the command, by torchrun if there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    arguments = ["--systems", ",".join(SYSTEMS), "--tasks", ",".join(TASKS), "--data", data, "--output", output]
    options = ["--batch-size", "2", "--pictures", "1", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "flexattn_cuda.cli", "eval", *map(str, arguments), *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(output.parent / "hub"), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate()
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    """The output of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    finish(start(data, output))
    return output


def costs(output: Path, without: tuple[str, ...] = ()) -> list[dict[str, str]]:
    rows = csv.DictReader((output / "costs.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


def files(output: Path) -> dict[str, bytes]:
    """Return all results but those that hold times."""
    found = [
        *output.glob("results.csv"),
        *output.glob("table_*.csv"),
        *output.glob("samples/*/*"),
        *output.glob("pictures/*"),
    ]
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


def answered(output: Path) -> list[tuple]:
    """Return what the journals name, in which a request that was answered twice stands twice."""
    lines = [(path, line) for path in output.glob("journals/*/*") for line in path.read_bytes().splitlines(True)]
    headers = dict(reversed(lines))
    records = [(path, from_line(line, zlib.crc32(headers[path]))) for path, line in lines if line != headers[path]]
    return sorted((path.parent.name, *key) for path, record in records if record for key in record["requests"])


def test_the_results_are_written_beside_the_papers(undisturbed):
    names = files(undisturbed)
    assert {"results.csv", "table_1.csv", "table_2.csv", "table_3.csv"} < set(names)
    assert {f"samples/{system}/{task}.jsonl" for system in SYSTEMS for task in TASKS} < set(names)
    [flexattn, llava] = csv.DictReader(names["table_1.csv"].decode().splitlines())
    assert (flexattn["V* overall published"], llava["V* overall published"]) == ("54.5", "47.6")
    assert float(flexattn["V* overall low"]) <= float(flexattn["V* overall"]) <= float(flexattn["V* overall high"])
    page = (undisturbed / "report.html").read_text()
    assert all(f'src="{name}"' in page for name in names if name.startswith("pictures/")) and "pictures/" in page


def test_an_image_with_ten_questions_is_encoded_once(undisturbed):
    found = {(row["system"], row["task"]): row for row in costs(undisturbed)}
    for system in SYSTEMS:
        row = found[system, "rsvqa_hrben"]
        assert (row["documents"], row["images_encoded"]) == ("30", "3")
        assert found[system, "vstar_bench_loss"]["images_encoded"] == "2"  # for eight options
    assert found["flexattn", "rsvqa_hrben"]["tiles_encoded"] == "27" and found["llava", "pope"]["selected"] == ""
    assert float(found["flexattn", "pope"]["selected"]) > 0 and 0 < float(found["flexattn", "pope"]["tiles"]) <= 9


def test_a_run_that_is_killed_at_any_moment_is_resumed(undisturbed, data, tmp_path):
    """Killed at a random line of its journals, and again while it is resumed; no request is answered twice."""
    output, lines = tmp_path / "out", sum(path.read_bytes().count(b"\n") for path in undisturbed.glob("journals/*/*"))
    moments = sorted(random.SystemRandom().sample(range(1, lines), 2))
    for moment in moments:
        process = start(data, output)
        while process.poll() is None and _lines(output) < moment:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(data, output))
    assert files(output) == files(undisturbed), moments
    assert costs(output, TIMES + ENCODED) == costs(undisturbed, TIMES + ENCODED)
    assert answered(output) == answered(undisturbed) and len(set(answered(output))) == len(answered(output))


def _lines(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in output.glob("journals/*/*"))


def test_two_processes_give_what_one_gives(undisturbed, data, tmp_path):
    finish(start(data, tmp_path / "out", processes=2))
    assert files(tmp_path / "out") == files(undisturbed)
    assert costs(tmp_path / "out", TIMES) == costs(undisturbed, TIMES)


# ----------------------------------------------------------------------------------------------------------- refusals


def evaluate(tmp_path: Path, folder: Path, **options):
    from flexattn_cuda.evaluation.run import evaluate as run

    given = {"output": tmp_path / "out", "systems": "llava", "data": folder, "device": "cpu"} | options
    return run(EvalOptions(**given))


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
