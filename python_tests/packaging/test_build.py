"""The decisions of setup.py, the one list of native sources, and the facts that a build carries."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import flexattn_cuda
from flexattn_cuda import build

ROOT = Path(__file__).resolve().parents[2]
CUDA_11_8 = ["3.5", "5.0", "6.0", "7.0", "7.5", "8.0", "8.6", "8.9", "9.0"]
CUDA_13_0 = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("flexattn_cuda_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------------------------- torch


def test_torch_is_found_where_an_isolated_build_hides_it(setup, tmp_path, monkeypatch):
    (tmp_path / "torch" / "utils").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.7.1+cu126'")
    (tmp_path / "torch" / "utils" / "__init__.py").touch()
    (tmp_path / "torch" / "utils" / "cpp_extension.py").write_text("CUDA_HOME = None")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "torch").is_dir()])
    before = list(sys.path)
    try:
        found, extension = setup.find_torch([str(tmp_path)])
    finally:
        for name in ("torch", "torch.utils", "torch.utils.cpp_extension"):
            sys.modules.pop(name, None)
    assert found.__version__ == "2.7.1+cu126" and extension.__name__ == "torch.utils.cpp_extension"
    assert sys.path == before, "the environment must not stay visible to the rest of the build"


def test_without_torch_one_line_says_what_to_do(setup, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails as if it were not installed
    with pytest.raises(SystemExit, match="^flexattn_cuda: no torch in this environment: `pip install torch`") as error:
        setup.find_torch([str(tmp_path)])
    assert "\n" not in str(error.value)


def test_the_environment_that_runs_the_build_is_searched(setup):
    assert any((Path(path) / "torch").is_dir() for path in setup.environment_paths())


@pytest.mark.parametrize("version", ["2.5.1", "1.13.0+cu117"])
def test_an_old_torch_is_refused(setup, version):
    with pytest.raises(SystemExit, match=f"torch {version.replace('+', '.')} is installed; 2.6 or newer is needed"):
        setup.check_torch_version(version)


@pytest.mark.parametrize("version", ["2.6.0", "2.10.0a0+git1234", "3.0.0+cpu"])
def test_a_new_torch_is_taken(setup, version):
    setup.check_torch_version(version)


# ---------------------------------------------------------------------------------------------------------------- CUDA


def test_what_nvcc_prints_is_understood(setup):
    version = "Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.36424714_0"
    assert setup.parse_toolkit(version, "compute_75\ncompute_90\ncompute_100\ncompute_121\n") == setup.Toolkit(
        "13.0", ["7.5", "9.0", "10.0", "12.1"]
    )
    assert setup.parse_toolkit("gibberish", "") is None


def test_a_folder_without_a_compiler_is_no_toolkit(setup, tmp_path):
    assert setup.find_toolkit(None) is None
    assert setup.find_toolkit(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("switch", "torch_cuda", "toolkit", "reason"),
    [
        ("auto", "13.0", "13.0", None),
        ("", "12.6", "12.9", None),
        ("1", "12.6", "12.1", None),
        ("0", "13.0", "13.0", "switched off with FLEXATTN_CUDA=0"),
        ("auto", None, "13.0", "torch 2.11.0 is a build without CUDA"),
        ("auto", "13.0", None, "no CUDA toolkit was found"),
        ("auto", "12.6", "13.0", "built with CUDA 12.6 and the toolkit is 13.0: their major versions must agree"),
    ],
)
def test_when_cuda_kernels_are_built(setup, switch, torch_cuda, toolkit, reason):
    found = setup.why_no_cuda(switch, "2.11.0", torch_cuda, toolkit)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("torch_cuda", "toolkit"), [(None, "13.0"), ("13.0", None), ("12.6", "13.0")])
def test_cuda_that_was_asked_for_and_cannot_be_ends_the_build(setup, torch_cuda, toolkit):
    with pytest.raises(SystemExit, match="FLEXATTN_CUDA=1, but"):
        setup.why_no_cuda("1", "2.11.0", torch_cuda, toolkit)


def test_an_unknown_switch_is_refused(setup):
    with pytest.raises(SystemExit, match="FLEXATTN_CUDA is 'yes'; allowed: 0, 1, auto"):
        setup.why_no_cuda("yes", "2.11.0", "13.0", "13.0")


def test_the_architectures_follow_from_the_compiler(setup, capsys):
    assert setup.architectures(CUDA_11_8, None) == ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0+PTX"]
    assert "V100" not in capsys.readouterr().err
    assert setup.architectures(CUDA_13_0, "") == ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]
    assert "cannot target the V100 (7.0)" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", ["7.0;8.0+PTX", "7.0 8.0+PTX", "7.0, 8.0+PTX;"])
def test_chosen_architectures_are_taken(setup, chosen):
    assert setup.architectures(CUDA_11_8, chosen) == ["7.0", "8.0+PTX"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("7.0;8.0", "TORCH_CUDA_ARCH_LIST asks for 7.0; this CUDA compiler targets 7.5"),
        ("Volta", "Volta; it takes numbers"),
    ],
)
def test_impossible_architectures_are_refused(setup, chosen, message):
    with pytest.raises(SystemExit, match=message):
        setup.architectures(CUDA_13_0, chosen)


# --------------------------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize(
    ("chosen", "cores", "free_gib", "kind", "expected"),
    [
        (None, 8, 64, "cpu", 8),
        (None, 8, 4, "cpu", 2),
        (None, 8, 4, "cuda", 1),
        (None, 2, 0.5, "cpu", 1),
        ("3", 2, 0.5, "cuda", 3),
    ],
)
def test_compiler_processes_follow_from_cores_and_memory(setup, chosen, cores, free_gib, kind, expected):
    assert setup.jobs(chosen, cores, free_gib, kind) == expected


@pytest.mark.parametrize("chosen", ["0", "-1", "many"])
def test_bad_max_jobs_is_refused(setup, chosen):
    with pytest.raises(SystemExit, match="it must be a whole number of at least 1"):
        setup.jobs(chosen, 2, 8, "cpu")


def test_the_machine_is_measured(setup):
    assert setup.cores() >= 1 and setup.free_memory_gib() > 0


def test_every_native_source_is_listed_once(setup):
    listed = setup.sources("cpu", "torch", "cuda", "bench", "simt")
    on_disk = {str(path.relative_to(ROOT)) for suffix in ("*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(suffix)}
    assert sorted(listed) == sorted(set(listed)) and set(listed) == on_disk


def test_text_survives_the_compiler(setup):
    assert setup.c_literal('a "b" \\ c') == '"a \\"b\\" \\\\ c"'


def test_the_version_is_read_from_the_package_and_nowhere_else(setup):
    assert setup.package_version() == flexattn_cuda.__version__
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and f'version = "{flexattn_cuda.__version__}"' not in project


# --------------------------------------------------------------------------------------------------------------- facts


def test_build_info():
    info = build.build_info()
    assert set(info) == {"version", "torch", "compiler", "cuda_toolkit", "architectures", "no_cuda_reason"}
    assert info["version"] == flexattn_cuda.__version__
    assert info["torch"] == torch.__version__
    assert (info["no_cuda_reason"] is None) == bool(info["cuda_toolkit"]) == bool(info["architectures"])


def test_a_build_without_cuda_says_why(monkeypatch):
    facts = build.build_info() | {"no_cuda_reason": "no CUDA toolkit was found"}
    monkeypatch.setattr(build, "build_info", lambda: facts)
    assert build.cuda_unavailable_reason() == "this build has no CUDA kernels: no CUDA toolkit was found"


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    facts = build.build_info() | {"no_cuda_reason": None, "architectures": ("7.5", "9.0+PTX")}
    monkeypatch.setattr(build, "build_info", lambda: facts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert build.cuda_unavailable_reason(0) == "torch sees no GPU on this machine"

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nAnd more.")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    told = "torch sees no GPU on this machine: The NVIDIA driver on your system is too old (found version 11040)."
    assert build.cuda_unavailable_reason(0) == told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    assert build.cuda_unavailable_reason(3) == "there is no GPU 3; this machine has 1"
    assert "compute capability 7.0" in build.cuda_unavailable_reason(0)
    assert "compiled for 7.5, 9.0+PTX" in build.cuda_unavailable_reason(0)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 0), ("7.0",), True),
        ((7, 5), ("7.0",), True),  # machine code of the same generation
        ((7, 0), ("7.5",), False),
        ((8, 0), ("7.5", "8.6"), False),
        ((8, 9), ("8.0",), True),
        ((12, 0), ("8.0", "9.0+PTX"), True),  # PTX is compiled for newer GPUs when it is loaded
        ((7, 5), ("8.0+PTX",), False),
        ((9, 0), ("9.0a",), True),
        ((10, 0), ("9.0a+PTX",), False),
    ],
)
def test_which_gpus_a_build_runs_on(capability, architectures, runs):
    reason = build.architecture_reason(capability, architectures)
    assert (reason is None) == runs
    assert runs or f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}" in reason
