"""The checkpoints of a run: which are complete, and which one a run is resumed from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from flexattn_cuda.checkpoints.files import first_line
from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import fsync_file, write_atomically
from flexattn_cuda.runs.versions import file_hash

_COMPLETE = "complete.json"  # the size and hash of every other file by name


class _Content(NamedTuple):
    """What a file of a checkpoint held when it was written: its size in bytes, and its SHA-256."""

    size: int
    hash: str


def checkpoint_folder(output: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return Path(output) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def mark_complete(folder: Path) -> None:
    """Flush a checkpoint to the disk, then list its files with their sizes and hashes."""
    contents = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _COMPLETE):
        with open(path, "rb") as file:
            fsync_file(file)
        contents[str(path.relative_to(folder))] = _Content(path.stat().st_size, file_hash(path))
    write_atomically(folder / _COMPLETE, json.dumps(contents))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what is raised where weights cannot be written, such as on a full disk, into InputError.

    torch's own writer of files raises RuntimeError, that of tokenizers a bare Exception.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)) and type(error) is not Exception:
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{folder} cannot be written: {reason}; make room there, then repeat the command to resume"
        ) from error


def last_complete_checkpoint(output: str | Path) -> Path | None:
    """Return the latest checkpoint of a run that is as it was written, or None if there is none."""
    return next((folder for folder in _checkpoints(Path(output)) if _is_complete(folder)), None)


class Resumable(NamedTuple):
    """The checkpoint to resume from, None without one, and those that were removed because they are damaged."""

    checkpoint: Path | None
    damaged: list[Path]


def keep_last_complete_checkpoint(output: Path) -> Resumable:
    """Remove the checkpoints after the last complete one: they are damaged, or their writing was interrupted."""
    damaged = []
    for folder in _checkpoints(output):
        if _is_complete(folder):
            return Resumable(folder, damaged)
        if (folder / _COMPLETE).exists():
            damaged.append(folder)
        shutil.rmtree(folder)
    return Resumable(None, damaged)


def remove_checkpoints(output: Path) -> None:
    """Remove all checkpoints of a run."""
    for folder in _checkpoints(output):
        shutil.rmtree(folder)


def _is_complete(folder: Path) -> bool:
    try:
        contents = json.loads((folder / _COMPLETE).read_text())
        return bool(contents) and all(_holds(folder / name, _Content(*content)) for name, content in contents.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _holds(path: Path, content: _Content) -> bool:
    return path.stat().st_size == content.size and file_hash(path) == content.hash


def _checkpoints(output: Path) -> list[Path]:
    """Return the checkpoint folders of a run, the latest first, whether complete or not."""
    steps = {}
    for path in output.iterdir():
        name = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", path.name)
        if name and path.is_dir():
            steps[int(name[1])] = path
    return [steps[step] for step in sorted(steps, reverse=True)]
