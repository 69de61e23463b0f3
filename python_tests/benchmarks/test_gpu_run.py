"""`make gpu` without a GPU: its plan, steps that fail, hang or lack their program, and the summary."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time

import gpu
import measuring
import pytest
import tables
import torch
from gpu import Expected, Result, Step

SOON = Expected(1, "it is tiny")


def python(code: str, name: str = "a step", **options) -> Step:
    return Step(
        name, [sys.executable, "-c", textwrap.dedent(code)], limit=options.pop("limit", 60), expected=SOON, **options
    )


# ------------------------------------------------------------------------------------------------------------- a step


def test_a_step_that_succeeds_says_its_last_line():
    result = gpu.run(python("print('first'); print('== 12 passed in 3.4s ==')"))
    assert (result.step, result.result, result.detail) == ("a step", "passed", "12 passed in 3.4s")
    assert result.output.startswith("first\n")


def test_a_step_that_fails_keeps_its_output():
    result = gpu.run(python("import sys; print('said'); sys.exit('why')"))
    assert result.result == "FAILED" and result.detail == "why" and "said" in result.output


@pytest.mark.slow
def test_a_step_that_hangs_is_ended_with_what_it_started():
    begin = time.perf_counter()
    hangs = """
        import subprocess, sys
        print("begun", flush=True)
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
    """
    result = gpu.run(python(hangs, limit=3))
    assert time.perf_counter() - begin < 30
    assert result.result == "FAILED" and result.detail == "killed after 3 s; begun"


@pytest.mark.parametrize("optional, becomes", [(True, "left out"), (False, "FAILED")])
def test_a_program_that_is_missing(optional, becomes):
    result = gpu.run(
        Step("memcheck", ["no-such-sanitizer", "--tool", "memcheck"], limit=1, expected=SOON, optional=optional)
    )
    assert result.result == becomes and result.detail == "there is no no-such-sanitizer on this machine"


def test_the_environment_of_a_step():
    code = "import os, flexattn_cuda; print(os.environ['FLEXATTN_CAPABILITY'], flexattn_cuda.__file__)"
    result = gpu.run(python(code, environment={"FLEXATTN_CAPABILITY": "70"}))
    assert result.detail == f"70 {gpu.ROOT / 'flexattn_cuda' / '__init__.py'}"


# -------------------------------------------------------------------------------------------------------------- pytest


@pytest.mark.slow
def test_tests_that_lack_a_package_do_not_look_green(tmp_path):
    (tmp_path / "test_good.py").write_text("def test(): pass")
    (tmp_path / "test_bad.py").write_text("import no_such_package")
    (tmp_path / "test_part.py").write_text("import pytest\ndef test(): pytest.importorskip('another_package')")
    tests = next(
        step
        for steps in gpu.stages(sys.executable, "9.0", tmp_path)
        for step in steps
        if step.name == "tests: operators"
    )
    command = tests.command[: tests.command.index("python_tests/ops")]
    result = gpu.run(Step("tests", [*command, "-q", str(tmp_path)], limit=100, expected=SOON))
    assert result.result == "FAILED"
    summary, bad, part = result.detail.split("; ")
    assert "1 passed" in summary and "1 error" in summary
    assert (
        bad.startswith("not collected: ")
        and "test_bad.py (ModuleNotFoundError: No module named 'no_such_package')" in bad
    )
    assert part.startswith("not run: ") and "test_part.py:2 (could not import 'another_package'" in part


@pytest.mark.slow
def test_without_hypothesis_the_other_files_run(tmp_path):
    (tmp_path / "hypothesis").mkdir()
    (tmp_path / "hypothesis" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'hypothesis'\")")
    files = ["python_tests/ops/test_attention_paths.py", "python_tests/analysis/test_viz.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-rE",
               "--continue-on-collection-errors", "--collect-only", *files]  # fmt: skip
    result = gpu.run(
        Step("tests", command, limit=100, expected=SOON, environment={"PYTHONPATH": f"{tmp_path}:{gpu.ROOT}"})
    )
    assert "test_every_path_equals_the_reference" in result.output
    assert (
        "not collected: python_tests/analysis/test_viz.py (ModuleNotFoundError: No module named 'hypothesis')"
        in result.detail
    )


# ------------------------------------------------------------------------------------------------------------ all steps


def test_a_failing_step_stops_no_other(tmp_path, capsys):
    tests = [
        python("print('fine')\nprint('2 passed')", "tests"),
        python("print('table')\nprint('end')", "more tests", shown=True),
    ]
    plan = [[python("raise SystemExit('broken')", "build")], tests]
    kept = []
    results = gpu.run_all(plan, tmp_path / "gpu.log", lambda results: kept.append(len(results)))
    assert kept == [1, 2, 3]
    assert [(r.step, r.result) for r in results] == [("build", "FAILED"), ("tests", "passed"), ("more tests", "passed")]
    assert gpu.exit_code(results) == 1 and gpu.exit_code(results[1:]) == 0
    said = capsys.readouterr().out
    assert "    broken\n" in said and "    table\n" in said and "    fine\n" not in said
    assert "===== build: FAILED" in (tmp_path / "gpu.log").read_text()


def test_a_step_that_was_left_out_is_no_failure():
    assert gpu.exit_code([Result("memcheck", "left out", 0.0, "there is no compute-sanitizer")]) == 0


def test_the_plan_ends_within_eight_minutes_and_nothing_runs_beside_the_benchmarks(tmp_path):
    plan = gpu.stages("python3", "9.0", tmp_path)
    assert sum(max(step.limit for step in steps) for steps in plan) < 8 * 60
    assert all(step.expected.seconds < step.limit and step.expected.why for steps in plan for step in steps)
    assert [step.name for step in plan[-1]] == ["benchmarks"]


def test_the_operators_run_again_with_the_kernels_of_a_v100(tmp_path):
    steps = {step.name: step for steps in gpu.stages("python3", "9.0", tmp_path) for step in steps}
    tests, volta = steps["tests: operators"], steps["tests: operators, the V100's kernels"]
    assert volta.command == tests.command and volta.environment == {"FLEXATTN_CAPABILITY": "70"}


def test_every_group_of_tests_is_there():
    for arguments in gpu.GROUPS.values():
        paths = [gpu.ROOT / word for word in arguments if word.startswith("python_tests/")]
        assert paths and all(path.exists() for path in paths)


def test_a_dry_run_prints_the_commands_and_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    environment = {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", "--out", str(tmp_path / "results")]
    said = subprocess.run(
        command, cwd=gpu.ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    lines = said.stdout
    assert "FLEXATTN_CUDA=1 TORCH_CUDA_ARCH_LIST=" in lines and "setup.py build_ext --inplace" in lines
    assert "--tool memcheck --report-api-errors no" in lines and "--tool racecheck" in lines
    assert "FLEXATTN_CAPABILITY=70" in lines and f"bench_attention.py --out {tmp_path / 'results'}" in lines
    assert "build: about 75 s" in lines and "expected in all: 75 + 10 + 90 + 110 = 285 s" in lines
    assert not (tmp_path / "results").exists()


def test_a_machine_without_a_gpu_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err == "gpu: torch sees no GPU on this machine; --dry-run prints the commands.\n"


def test_the_summary_names_the_machine(monkeypatch, tmp_path, capsys):
    facts = measuring.Machine("NVIDIA Test", "1.2", "2.11.0", "13.0")
    monkeypatch.setattr(gpu, "architecture_here", lambda: "9.0")
    monkeypatch.setattr(measuring, "machine", lambda device: facts)
    monkeypatch.setattr(
        gpu, "stages", lambda *_: [[python("print('built')", "build")], [python("raise SystemExit('no')", "tests")]]
    )
    assert gpu.main(["--out", str(tmp_path)]) == 1
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert lines[0] == "device,driver,torch,cuda,step,result,seconds,detail"
    assert lines[1].startswith("NVIDIA Test,1.2,2.11.0,13.0,build,passed,") and lines[2].endswith(",no")
    said = capsys.readouterr().out
    assert "device NVIDIA Test, driver 1.2" in said and "2 steps in" in said and "1 failed" in said


@pytest.mark.parametrize("rich", [True, False])
def test_tables_do_without_rich(monkeypatch, capsys, rich):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    tables.print_table("Times", ("step", "s"), [("build", "7"), ("tests", "123")])
    said = capsys.readouterr().out
    assert "Times" in said and "  7" in said and "123" in said


def test_rows_with_different_columns_make_one_table(tmp_path):
    tables.write_csv(tmp_path / "rows.csv", [{"a": 1, "b": 2}, {"a": 3, "c": 4}])
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["a,b,c", "1,2,", "3,,4"]


def test_a_machine_without_a_driver_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert measuring.driver_version() == "unknown"
    assert measuring.machine("cpu").torch == torch.__version__
