"""Reading a checkpoint's files: JSON objects, links that leave the folder, and errors in one line."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import CheckpointError

_READ_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin")
_HASHED_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".bin")
_MAX_MESSAGE = 400  # characters of another library's message


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} if there is no such file.

    Raises:
        CheckpointError: If the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return values


def refuse_foreign_files(folder: Path) -> None:
    """Raise CheckpointError if what would be read is a link to outside of the folder, or a pipe or device.

    Reading a pipe might never end. Links of the hub cache are fine: snapshots/COMMIT/FILE -> blobs/HASH of the same
    repository.
    """
    for path in folder.iterdir():
        if path.suffix not in _READ_SUFFIXES:
            continue
        if path.is_symlink() and not is_inside(path, folder):
            raise CheckpointError(f"{path} is a link to a file outside of its folder; put the file itself there")
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path} is a pipe or a device; put a file there")


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path, links followed, lies in the folder or is a blob of the hub cache that holds the folder."""
    target, home = path.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return True
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    if snapshots is None or not snapshots.parent.name.startswith("models--"):
        return False
    # A blob may itself be a link into the store that repositories share, so only its first step is looked at.
    blob = Path(path.parent.resolve(), path.readlink()) if path.is_symlink() else target
    return Path(os.path.normpath(blob)).parent == snapshots.parent / "blobs"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:_MAX_MESSAGE] if lines else type(error).__name__


def within(seconds: float, what: str, call: Callable[[], Any]) -> None:
    """Call a function that runs code of a checkpoint, such as its chat template.

    Raises:
        CheckpointError: "WHAT: ..." if it has not returned in time; it is ended then.
        Exception: What the function raises.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        # Raised in the thread at its next step in Python, of which the loops of a template have many.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise CheckpointError(f"{what}: no end after {seconds:g} seconds")
    if errors:
        raise errors[0]


@contextmanager
def refusing(what: str, *passing: type[Exception]) -> Iterator[None]:
    """Turn any error of the block into CheckpointError("WHAT: first line of the message").

    transformers, tokenizers and safetensors raise a dozen types of errors on damaged files, so all are caught except
    CheckpointError itself, out-of-memory errors, and `passing`. A panic of their Rust code is not even an Exception.
    """
    try:
        yield
    except (CheckpointError, MemoryError, *passing):
        raise
    except BaseException as error:
        kind = type(error).__name__
        if kind == "OutOfMemoryError" or not (isinstance(error, Exception) or kind == "PanicException"):
            raise
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is never executed"
        raise CheckpointError(f"{what}: {reason}") from error


def content_hash(folder: Path) -> str:
    """Hash everything that determines a model's answers, wherever its folder is."""
    total = hashlib.blake2b()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _HASHED_SUFFIXES and path.is_file()):
        one = hashlib.blake2b()
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                one.update(part)
        total.update(path.name.encode("utf-8", "surrogateescape") + one.digest())
    return total.hexdigest()
