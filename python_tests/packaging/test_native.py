"""If the compiled part cannot be loaded, one sentence says why and what to do. Each case is a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flexattn_cuda

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


@pytest.fixture
def install(tmp_path):
    """install(version): put a package with a compiled part somewhere else, as `pip install .` does."""

    def install(version: str) -> Path:
        folder = tmp_path / "installed" / "flexattn_cuda"
        folder.mkdir(parents=True)
        facts = {"torch": torch.__version__, "version": version}
        (folder / "_C.py").write_text(f"def build_info():\n    return {facts}\n")
        described = folder.parent / f"flexattn_cuda-{version}.dist-info" / "METADATA"
        described.parent.mkdir()
        described.write_text(f"Metadata-Version: 2.1\nName: flexattn_cuda\nVersion: {version}\n")
        return folder

    return install


def run(package: Path, program: str) -> subprocess.CompletedProcess:
    """Run a program beside the package.

    With -S, since an editable installation would lend its compiled part.
    """
    found = (package.parent, package.parent / "installed", Path(torch.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, found))}
    command = [sys.executable, "-S", "-c", program]
    return subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True)


def import_error(package: Path) -> str:
    """Return the last line that importing the operators prints."""
    done = run(package, "import flexattn_cuda.ops")
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
    assert message.endswith(f"run `pip install .` in {package.parent}") and "circular" not in message


@pytest.mark.slow
def test_sources_without_a_build_use_the_installed_compiled_part(package, install):
    folder = install(flexattn_cuda.__version__)
    done = run(package, "from flexattn_cuda import native; print(native.__file__, native.compiled.__file__)")
    assert done.stdout.split() == [str(package / "native.py"), str(folder / "_C.py")], done.stderr


@pytest.mark.slow
def test_an_installed_compiled_part_of_another_version_is_refused(package, install):
    folder = install("0.0.7")
    (package.parent / "setup.py").touch()
    assert import_error(package).endswith(
        f"flexattn_cuda {flexattn_cuda.__version__} in {package} cannot use the compiled part of flexattn_cuda 0.0.7 "
        f"in {folder}; run `pip install .` in {package.parent}"
    )


@pytest.mark.slow
def test_a_build_in_place_of_another_version_is_refused(package):
    (package.parent / "setup.py").touch()
    facts = {"torch": torch.__version__, "version": "0.0.7"}
    (package / "_C.py").write_text(f"def build_info():\n    return {facts}\n")
    message = import_error(package)
    assert "the compiled part of flexattn_cuda 0.0.7" in message
    assert message.endswith(f"run `pip install --no-build-isolation --editable .` in {package.parent}")


@pytest.mark.slow
def test_an_installation_without_its_compiled_part_says_so(package):
    message = import_error(package)
    assert f"the compiled part of flexattn_cuda is missing from {package}; install flexattn_cuda again" in message


@pytest.mark.slow
def test_a_build_for_another_python_says_so(package):
    (package / "_C.cpython-35m-x86_64-linux-gnu.so").touch()
    message = import_error(package)
    assert "flexattn_cuda was built for another Python than" in message and "_C.cpython-35m" in message
