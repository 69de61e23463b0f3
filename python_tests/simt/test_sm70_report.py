"""The V100 report as a program. (`make sm70` runs it on the kernels; test_sass.py tests what it computes.)"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import sm70_report
from sass.instructions import Instruction
from sass.kernel import Kernel, Resources
from sass.toolkit import Toolkit

BUDGET = {"kernel": "tiles<*", "threads": 128, "dynamic_shared_bytes": 0, "wavefronts_over_ideal": 1.05}


@pytest.fixture
def ready(monkeypatch, tmp_path):
    """Arguments of a report on one kernel that is compiled already."""
    loop = [Instruction(0, "FFMA")]
    compiled = Kernel("tiles<128>", Resources(64, 0, 0, 0), body=loop, loop=loop)
    monkeypatch.setattr(Toolkit, "find", lambda *_: Toolkit(Path("nvcc"), "g++", 70))
    monkeypatch.setattr(Toolkit, "compile", lambda *_: [compiled])
    monkeypatch.setattr(sm70_report, "kernel_sources", lambda root: [root / "tiles.cu"])
    budgets = tmp_path / "budgets.json"
    budgets.write_text(json.dumps([BUDGET]))
    return ["--budgets", str(budgets), "--out", str(tmp_path)]


def test_a_kernel_that_was_not_measured_is_named(ready, tmp_path, capsys):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"tiles<128>": {"LDS": {"average": 4, "ideal": 4}}}))
    assert sm70_report.main([*ready, "--wavefronts", str(file)]) == 0
    file.write_text("{}")
    assert sm70_report.main([*ready, "--wavefronts", str(file)]) == 1
    assert capsys.readouterr().err == "tiles<128>: its wavefronts were not measured.\n"


def test_the_ideal_is_assumed_only_on_request(ready, tmp_path, monkeypatch, capsys):
    without_torch = tmp_path / "python"
    without_torch.write_text("#!/bin/sh\necho 'wavefronts: torch is missing' >&2\nexit 1\n")
    without_torch.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(without_torch))
    with pytest.raises(SystemExit) as ended:
        sm70_report.main(ready)
    assert ended.value.code == 2 and "wavefronts: torch is missing" in capsys.readouterr().err
    assert sm70_report.main([*ready, "--ideal-wavefronts"]) == 0
    assert "1 kernels, all within their budgets" in capsys.readouterr().out


def test_a_part_of_the_sources_is_not_asked_for_the_other_budgets(ready, tmp_path, capsys):
    (tmp_path / "budgets.json").write_text(json.dumps([BUDGET, {"kernel": "gather", "threads": 32}]))
    assert sm70_report.main([*ready, "--ideal-wavefronts", "--only", "tiles*"]) == 0
    assert sm70_report.main([*ready, "--ideal-wavefronts"]) == 1
    assert capsys.readouterr().err == "gather: the budget matches no kernel.\n"


def test_the_tables_are_written_as_csv(ready, tmp_path):
    assert sm70_report.main([*ready, "--ideal-wavefronts", "--csv", str(tmp_path / "sm70.csv")]) == 0
    with open(tmp_path / "sm70.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["kernel"], row["registers"], row["FP32"], row["bound"]) == ("tiles<128>", "64", "1", "FMA")


def test_a_missing_or_too_new_compiler_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        sm70_report.main(["--nvcc", str(tmp_path / "nvcc")])
    assert ended.value.code == 2 and "set NVCC to an nvcc up to 12.9" in capsys.readouterr().err
    newer = tmp_path / "nvcc"
    newer.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    newer.chmod(0o755)
    with pytest.raises(SystemExit) as ended:
        sm70_report.main(["--nvcc", str(newer)])
    assert ended.value.code == 2 and "release 13.0: sm_70 takes an nvcc up to 12.9" in capsys.readouterr().err
