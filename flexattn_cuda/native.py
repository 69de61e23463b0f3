"""The compiled part of the package, flexattn_cuda._C. If it cannot be loaded, one sentence says why and what to do."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parent
_NAME = "flexattn_cuda._C"


def _load() -> ModuleType:
    """Return flexattn_cuda._C. Raise ImportError if it is missing or was built with another torch."""
    try:
        module = importlib.import_module(_NAME)
    except ImportError as error:
        raise ImportError(_why_not_loaded(error)) from error
    built_with = str(module.build_info()["torch"])
    if _release(built_with) != _release(torch.__version__):
        # It loads by luck: the C++ interface may differ all the same.
        raise ImportError(_exchanged_torch(built_with))
    return module


def _why_not_loaded(error: ImportError) -> str:
    found = importlib.util.find_spec(_NAME)
    if found is None or found.origin is None:
        return _why_missing()
    built_with = _torch_named_in(Path(found.origin))
    if built_with not in (None, torch.__version__):
        return _exchanged_torch(built_with)
    return f"the compiled part of flexattn_cuda cannot be loaded ({error}); {_rebuild()}"


def _why_missing() -> str:
    others = [path.name for path in sorted(_FOLDER.glob("_C.*"))]
    if others:
        python = ".".join(map(str, sys.version_info[:2]))
        return f"flexattn_cuda was built for another Python than {python} ({', '.join(others)}); {_rebuild()}"
    if (_ROOT / "setup.py").exists():
        return (
            f"flexattn_cuda has not been built: {_FOLDER} holds its sources only; {_rebuild()}, or run Python from"
            " another folder to use an installed flexattn_cuda"
        )
    return f"the compiled part of flexattn_cuda is missing from {_FOLDER}; install flexattn_cuda again"


def _exchanged_torch(built_with: str | None) -> str:
    return (
        f"flexattn_cuda was built with torch {built_with} but torch {torch.__version__} is installed; {_rebuild()}, or"
        f" install torch {built_with} again"
    )


def _rebuild() -> str:
    if (_ROOT / "setup.py").exists():
        return f"run `pip install --no-build-isolation --editable .` in {_ROOT}"
    return "run `pip install .` in the source folder of flexattn_cuda"


def _release(version: str) -> list[str]:
    """Return the major and minor version; patch releases of torch keep the C++ interface."""
    return re.findall(r"\d+", version)[:2]


def _torch_named_in(module: Path) -> str | None:
    """Return the torch version that csrc/torch/module.cpp left in the bytes of a compiled module, or None."""
    found = re.search(rb"flexattn_cuda built with torch ([^\0]+)\0", module.read_bytes())
    return found.group(1).decode() if found else None


compiled = _load()
