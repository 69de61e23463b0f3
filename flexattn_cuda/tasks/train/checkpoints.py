"""The checkpoints of a run: which are complete, and which one a run is resumed from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from flexattn_cuda.runs.files import fsync_file, write_atomically

_COMPLETE = "complete.json"  # the size of every other file by name


def checkpoint_folder(output: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return Path(output) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def mark_complete(folder: Path) -> None:
    """Flush a checkpoint to the disk, then list its files with their sizes."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _COMPLETE):
        with open(path, "rb") as file:
            fsync_file(file)
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_atomically(folder / _COMPLETE, json.dumps(sizes))


def last_complete_checkpoint(output: str | Path) -> Path | None:
    """Return the latest checkpoint of a run that was written completely, or None if there is none."""
    return next((folder for folder in _checkpoints(Path(output)) if _is_complete(folder)), None)


def remove_incomplete_checkpoints(output: Path) -> None:
    """Remove the checkpoints that a run was interrupted in writing."""
    for folder in _checkpoints(output):
        if not _is_complete(folder):
            shutil.rmtree(folder)


def remove_checkpoints(output: Path) -> None:
    """Remove all checkpoints of a run."""
    for folder in _checkpoints(output):
        shutil.rmtree(folder)


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _COMPLETE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _checkpoints(output: Path) -> list[Path]:
    """Return the checkpoint folders of a run, the latest first, whether complete or not."""
    steps = {}
    for path in output.iterdir():
        name = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", path.name)
        if name and path.is_dir():
            steps[int(name[1])] = path
    return [steps[step] for step in sorted(steps, reverse=True)]
