"""If the compiled part cannot be loaded, one sentence says why and what to do. Each case is a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).resolve().parents[2] / "flexattn_cuda"
COMPILED = "_C.cpython-{}{}-x86_64-linux-gnu.so".format(*sys.version_info)


@pytest.fixture
def package(tmp_path):
    """A package without its compiled part."""
    copy = tmp_path / "flexattn_cuda"
    copy.mkdir()
    for name in ("__init__", "native", "ops", "registration"):
        shutil.copy(PACKAGE / f"{name}.py", copy)
    return copy


def import_error(package: Path) -> str:
    """Return the last line that importing the operators prints.

    With -S, since an editable installation would lend its compiled part.
    """
    installed = Path(torch.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import flexattn_cuda.ops"],
        cwd=package.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (package.parent, installed)))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_the_compiled_part_names_its_torch():
    from flexattn_cuda import native

    if native.compiled.build_info()["cuda_toolkit"].startswith("executor"):
        pytest.skip("the executor's module is somewhere else")
    assert native._torch_named_in(Path(native.compiled.__file__)) == native.compiled.build_info()["torch"]


@pytest.mark.slow
def test_a_torch_that_was_exchanged_is_named_beside_the_one_built_with(package):
    (package / COMPILED).write_bytes(b"\x7fELF... flexattn_cuda built with torch 1.2.3+cu999\0 ...")
    message = import_error(package)
    assert message.startswith(
        f"ImportError: flexattn_cuda was built with torch 1.2.3+cu999 but torch {torch.__version__} is installed"
    )
    assert "run `pip install .`" in message and "circular" not in message


@pytest.mark.slow
def test_a_compiled_part_that_loads_with_another_torch_is_refused(package):
    (package / "_C.py").write_text("def build_info():\n    return {'torch': '1.2.3+cu999'}\n")
    message = import_error(package)
    assert f"built with torch 1.2.3+cu999 but torch {torch.__version__} is installed" in message


@pytest.mark.slow
def test_a_damaged_compiled_part_shows_what_the_loader_says(package):
    (package / COMPILED).write_bytes(f"flexattn_cuda built with torch {torch.__version__}\0".encode())
    message = import_error(package)
    assert "cannot be loaded" in message and COMPILED in message and "run `pip install" in message


@pytest.mark.slow
def test_a_source_folder_without_a_build_says_so(package):
    (package.parent / "setup.py").touch()
    message = import_error(package)
    assert f"flexattn_cuda has not been built: {package} holds its sources only" in message
    assert f"run `pip install --no-build-isolation --editable .` in {package.parent}" in message
    assert "circular" not in message


@pytest.mark.slow
def test_an_installation_without_its_compiled_part_says_so(package):
    message = import_error(package)
    assert f"the compiled part of flexattn_cuda is missing from {package}; install flexattn_cuda again" in message


@pytest.mark.slow
def test_a_build_for_another_python_says_so(package):
    (package / "_C.cpython-35m-x86_64-linux-gnu.so").touch()
    message = import_error(package)
    assert "flexattn_cuda was built for another Python than" in message and "_C.cpython-35m" in message
