"""The compiled part of the package, flexattn_cuda._C. If it cannot be loaded, one sentence says why and what to do.

It lies beside these sources, or in the installed package: in the root of the repository, Python finds the sources
before a package that `pip install .` has put elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import torch

from flexattn_cuda import __version__

_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parent
_NAME = "flexattn_cuda._C"


def _load() -> ModuleType:
    """Return flexattn_cuda._C. Raise ImportError if it is missing, or of another torch or another version."""
    found = importlib.util.find_spec(_NAME) or _find_installed()
    if found is None or found.origin is None:
        raise ImportError(_why_missing())
    origin = Path(found.origin)
    try:
        module = _module(found)
    except ImportError as error:
        raise ImportError(_why_not_loaded(error, origin)) from error
    facts: dict[str, str] = module.build_info()
    if _release(facts["torch"]) != _release(torch.__version__):
        # It loads by luck: the C++ interface may differ all the same.
        raise ImportError(_exchanged_torch(facts["torch"], origin))
    if facts["version"] != __version__:
        raise ImportError(
            f"flexattn_cuda {__version__} in {_FOLDER} cannot use the compiled part of flexattn_cuda "
            f"{facts['version']} in {origin.parent}; {_rebuild(origin)}"
        )
    return module


def _find_installed() -> ModuleSpec | None:
    """Return the compiled part of an installed package; None if there is none for this Python."""
    installed = importlib.metadata.distributions(name="flexattn_cuda")
    return PathFinder.find_spec(_NAME, [str(one.locate_file("flexattn_cuda")) for one in installed])


def _module(found: ModuleSpec) -> ModuleType:
    """Return the module, which `import` alone would look for beside the sources."""
    if _NAME not in sys.modules:
        module = importlib.util.module_from_spec(found)
        assert found.loader is not None
        found.loader.exec_module(module)
        sys.modules[_NAME] = module
    return sys.modules[_NAME]


def _why_not_loaded(error: ImportError, origin: Path) -> str:
    built_with = _torch_named_in(origin)
    if built_with not in (None, torch.__version__):
        return _exchanged_torch(built_with, origin)
    return f"the compiled part of flexattn_cuda cannot be loaded ({error}); {_rebuild(origin)}"


def _why_missing() -> str:
    others = [path.name for path in sorted(_FOLDER.glob("_C.*"))]
    if others:
        python = ".".join(map(str, sys.version_info[:2]))
        return f"flexattn_cuda was built for another Python than {python} ({', '.join(others)}); {_rebuild()}"
    if (_ROOT / "setup.py").exists():
        return f"flexattn_cuda has not been built: {_FOLDER} holds its sources only; {_rebuild()}"
    return f"the compiled part of flexattn_cuda is missing from {_FOLDER}; install flexattn_cuda again"


def _exchanged_torch(built_with: str | None, origin: Path) -> str:
    return (
        f"flexattn_cuda was built with torch {built_with} but torch {torch.__version__} is installed; "
        f"{_rebuild(origin)}, or install torch {built_with} again"
    )


def _rebuild(origin: Path | None = None) -> str:
    """Say how to build a compiled part again: where it lies, if that is beside the sources."""
    if not (_ROOT / "setup.py").exists():
        return "run `pip install .` in the source folder of flexattn_cuda"
    in_place = origin is not None and origin.parent == _FOLDER
    return f"run `pip install {'--no-build-isolation --editable .' if in_place else '.'}` in {_ROOT}"


def _release(version: str) -> list[str]:
    """Return the major and minor version; patch releases of torch keep the C++ interface."""
    return re.findall(r"\d+", version)[:2]


def _torch_named_in(module: Path) -> str | None:
    """Return the torch version that csrc/torch/module.cpp left in the bytes of a compiled module, or None."""
    found = re.search(rb"flexattn_cuda built with torch ([^\0]+)\0", module.read_bytes())
    return found.group(1).decode() if found else None


compiled = _load()
