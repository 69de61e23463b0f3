"""A short form of `make attack`, and its machinery: a crash, a hang and a lie are noticed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexattn_cuda.errors import InputError
from python_tests.attack.runner import Findings, Kind, _Fork, run
from python_tests.attack.verdicts import LostError, Verdict, WrongError

ROOT = Path(__file__).parents[2]


class Pretended:
    """An attack whose cases end in each way."""

    def __init__(self, folder: Path):
        self._path = folder / "file"

    def run(self, number: int, rng: random.Random) -> Verdict:
        self._path.write_text("a folder of its own")
        match number:
            case 1:
                raise InputError("the image is damaged; use another")
            case 2:
                raise InputError("the image is damaged\nuse another")
            case 3:
                raise KeyError("image")
            case 4:
                os.abort()
            case 5:
                time.sleep(60)
            case 6:
                raise WrongError("42 is not 43")
            case 7:
                raise LostError("an answer is gone")
        return Verdict.RIGHT


def names(findings: Findings) -> list[str]:
    return [name for case in range(9) for name in findings.all["pretended", case].verdicts]


@pytest.mark.slow
def test_every_end_of_a_case_has_its_verdict_and_a_run_is_resumed(tmp_path, capsys):
    kind = Kind("pretended", Pretended, cases=9, seconds=2.0)
    findings = Findings(tmp_path / "verdicts", seed=3)
    run([kind], findings, lambda kind: kind.cases, jobs=2, until=time.monotonic() + 60, progress=False)
    bad = ["traceback", "traceback", "crash", "hang", "silently wrong", "lost"]
    assert names(findings) == ["right", "refused in one sentence", *bad, "right"]
    assert len(findings.bad()) == len(bad) and "pretended 4: {'crash': 1}" in capsys.readouterr().err
    assert findings.table().splitlines()[-1].split()[1:-1:2] == ["pretended", "9", "1", "2", "2", "1", "1", "1", "1"]

    with open(tmp_path / "verdicts", "a") as file:
        file.write('{"kind": "pre')  # a run was ended while it wrote
    again = Findings(tmp_path / "verdicts", seed=3)
    run([kind], again, lambda kind: pytest.fail("run again") if again.all == {} else 9, 2, time.monotonic() + 60, False)
    assert again.all == findings.all and Findings(tmp_path / "verdicts", seed=4).all == {}


class Slow:
    """An attack whose only case takes longer than it may."""

    def __init__(self, folder: Path):
        pass

    def run(self, number: int, rng: random.Random) -> Verdict:
        time.sleep(2.5)
        return Verdict.RIGHT


@pytest.mark.slow
@pytest.mark.parametrize(("waits", "verdict"), [(False, "hang"), (True, "right")])
def test_time_in_which_others_had_the_processor_is_no_hang(tmp_path, monkeypatch, waits, verdict):
    monkeypatch.setattr(_Fork, "seconds_without_processor", lambda _: time.monotonic() if waits else 0.0)
    findings = Findings(tmp_path / "verdicts", seed=3)
    run([Kind("slow", Slow, cases=1, seconds=0.5)], findings, lambda kind: 1, 1, time.monotonic() + 60, False)
    assert findings.all["slow", 0].verdicts == {verdict: 1}


def wait_for_children_that_share_a_processor() -> None:
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    for _ in range(2):
        if os.fork() == 0:
            while True:
                pass
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts it")
def test_time_in_which_children_waited_for_a_processor_counts():
    process, until = _Fork(wait_for_children_that_share_a_processor), time.monotonic() + 60
    own, all_of_them = 0.0, 0.0
    try:
        while all_of_them < own + 0.5 and time.monotonic() < until:
            time.sleep(0.05)
            own = int(Path(f"/proc/{process._pid}/schedstat").read_text().split()[1]) / 1e9
            all_of_them = process.seconds_without_processor()
    finally:
        process.stop()
    assert all_of_them >= own + 0.5
    assert process.seconds_without_processor() >= all_of_them  # what has ended is not forgotten


@pytest.mark.slow
def test_the_short_form_of_the_attack_finds_nothing(tmp_path):
    command = [sys.executable, "-m", "python_tests.attack", "--short", "--out", tmp_path / "verdicts", "--jobs", "1"]
    paths = [str(ROOT), str(ROOT / "python_tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 2 + 9  # the head of the table, and a row for each kind with a short form
