"""Run everything that a machine with one NVIDIA GPU can tell, in under eight minutes and without a network.

    python benchmarks/gpu.py [--out build/gpu] [--dry-run]     (make gpu)

Builds the extension in place for this GPU, runs the tests on it, the operators' tests once more with the V100's kernels
(FLEXATTN_CAPABILITY=70), every kernel once under compute-sanitizer, and the benchmarks. Steps of a stage run at the
same time, but nothing runs beside the benchmarks. A failing step stops no other.

Written to --out: summary.csv, gpu.log with the output of every step, and what the benchmarks write.
Exit 1: a step failed; a test file that could not be collected fails its step. Exit 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import measuring
import tables
import torch

ROOT = Path(__file__).resolve().parent.parent
# Folders of tests that run at the same time, in a process each; the other folders are one more group.
GROUPS = {
    "operators": "python_tests/ops",
    "model": "python_tests/model",
    "tasks": "python_tests/tasks",
    "study": "python_tests/study",
    "analysis": "python_tests/analysis",
}
PASSED, FAILED, LEFT_OUT = "passed", "FAILED", "left out"
FAILED_LINES = 25  # of a failed step's output that are printed
TEST_LIMIT = 150  # seconds


@dataclass(frozen=True)
class Step:
    """A command, and how to run it.

    command: The first word is a program's name or path.
    limit: Seconds after which it is killed.
    optional: Leave it out if there is no such program.
    shown: Print its output even if it succeeds.
    """

    name: str
    command: list[str]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)
    optional: bool = False
    shown: bool = False

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.command])


@dataclass(frozen=True)
class Result:
    step: str
    result: str
    seconds: float
    detail: str
    output: str = ""


def stages(python: str, architecture: str, out: Path) -> list[list[Step]]:
    """Return the steps, stage by stage. architecture: That of the GPU, as TORCH_CUDA_ARCH_LIST takes it."""
    build = Step(
        "build",
        [python, "setup.py", "build_ext", "--inplace"],
        limit=180,
        environment={"FLEXATTN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture},
    )
    benchmark = [python, "benchmarks/bench_attention.py", "--out", str(out), "--seconds", "90"]
    return [
        [build],
        [Step("the build runs on this GPU", [python, "-c", RUNS_HERE], limit=20)],
        [*test_steps(python), *sanitizer_steps(python)],
        [Step("benchmarks", benchmark, limit=125, shown=True)],
    ]


def test_steps(python: str) -> list[Step]:
    pytest = [python, "-m", "pytest", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-rfEs"]
    ignored = [f"--ignore={folder}" for folder in GROUPS.values()]
    return [
        *(Step(f"tests: {group}", [*pytest, folder], TEST_LIMIT) for group, folder in GROUPS.items()),
        Step("tests: the rest", [*pytest, "python_tests", *ignored], TEST_LIMIT),
        Step(
            "tests: operators, the V100's kernels",
            [*pytest, GROUPS["operators"]],
            TEST_LIMIT,
            environment={"FLEXATTN_CAPABILITY": "70"},
        ),
    ]


def sanitizer_steps(python: str) -> list[Step]:
    """Every kernel once; memcheck with an allocation of its own for every tensor."""
    options = ["--kernel-regex", "kns=flexattn", "--error-exitcode", "1"]
    check = [python, "benchmarks/bench_attention.py", "--quick", "--check"]
    environments = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}
    return [
        Step(tool, [sanitizer_path(), "--tool", tool, *options, *check], TEST_LIMIT, environment, optional=True)
        for tool, environment in environments.items()
    ]


RUNS_HERE = (
    "import sys; from flexattn_cuda import build; print(build.build_info()); sys.exit(build.cuda_unavailable_reason(0))"
)


def sanitizer_path() -> str:
    """Return where compute-sanitizer is; a toolkit may have it outside of the folder with nvcc."""
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    folders = [str(home / part) for home in homes for part in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"


def run(step: Step) -> Result:
    if shutil.which(step.command[0]) is None:
        result = LEFT_OUT if step.optional else FAILED
        return Result(step.name, result, 0.0, f"there is no {step.command[0]} on this machine")
    print(f"{step.name}: {step}", flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment() | step.environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=step.limit)
        ended = ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers and workers that it started
        output, _ = process.communicate()
        ended = f"killed after {step.limit} s; "
    result = PASSED if process.returncode == 0 and not ended else FAILED
    return Result(step.name, result, time.perf_counter() - begin, ended + detail(output), output)


def environment() -> dict[str, str]:
    """Return a step's environment: its Python (with ninja) comes first, and this repository before a package."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PATH": path,
        "PYTHONPATH": packages,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
    }


def detail(output: str) -> str:
    """Return the last line, and the tests that pytest could not run because a package is missing."""
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    return "; ".join([lines[-1] if lines else "no output", *not_run(output)])


def not_run(output: str) -> list[str]:
    """Return the files that could not be collected and the tests that lack a package, with the reasons."""
    files = re.findall(r"^_+ ERROR collecting (\S+) _+$.*?^E  +(.*?)$", output, re.M | re.S)
    tests = re.findall(r"^SKIPPED \[\d+\] (\S+): (could not import .*)$", output, re.M)
    return [f"not collected: {file} ({why})" for file, why in files] + [f"not run: {at} ({why})" for at, why in tests]


def run_all(stages: list[list[Step]], log: Path) -> list[Result]:
    """Run every step of each stage at the same time; print the results and log the outputs."""
    results = []
    with log.open("w") as file:
        for steps in stages:
            with ThreadPoolExecutor(len(steps)) as pool:
                for step, result in zip(steps, pool.map(run, steps)):
                    results.append(result)
                    print_result(step, result)
                    file.write(f"\n===== {result.step}: {result.result} after {result.seconds:.1f} s\n{result.output}")
                    file.flush()
    return results


def print_result(step: Step, result: Result) -> None:
    print(f"{result.step}: {result.result} after {result.seconds:.0f} s: {result.detail}", flush=True)
    lines = result.output.splitlines()
    if step.shown:
        print("\n".join(f"    {line}" for line in lines), flush=True)
    elif result.result == FAILED:
        print("\n".join(f"    {line}" for line in lines[-FAILED_LINES:]), flush=True)


def exit_code(results: list[Result]) -> int:
    return 1 if any(result.result == FAILED for result in results) else 0


def architecture_here() -> str | None:
    return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def print_plan(plan: list[list[Step]]) -> None:
    for number, steps in enumerate(plan, start=1):
        for step in steps:
            print(f"stage {number}, at most {step.limit} s: {step}")


def write_summary(results: list[Result], out: Path) -> None:
    machine = measuring.machine("cuda")
    header = ("step", "result", "s", "detail")
    rows = [(result.step, result.result, f"{result.seconds:.0f}", result.detail) for result in results]
    columns = [dict(zip(("step", "result", "seconds", "detail"), row)) for row in rows]
    tables.write_csv(out / "summary.csv", [machine.columns() | row for row in columns])
    tables.print_table(str(machine), header, rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for results (default: build/gpu)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none of them")
    args = parser.parse_args(arguments)

    architecture, out = architecture_here(), args.out.resolve()
    plan = stages(sys.executable, architecture or "ARCHITECTURE-OF-THE-GPU", out)
    if args.dry_run:
        print_plan(plan)
        return 0
    if architecture is None:
        print("gpu: torch sees no GPU on this machine; --dry-run prints the commands.", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    results = run_all(plan, out / "gpu.log")
    write_summary(results, out)
    failed = sum(result.result == FAILED for result in results)
    print(f"{len(results)} steps in {time.perf_counter() - begin:.0f} s, {failed} failed; results in {out}")
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
