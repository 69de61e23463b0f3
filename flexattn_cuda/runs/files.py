"""Files that outlive this process, that one process writes at a time, and what is said where they cannot be written."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from flexattn_cuda.errors import InputError


def lock(file: BinaryIO | int, path: Path) -> None:
    """Until the file (or folder, by its descriptor) is closed, so that two runs never write one. Some file systems have no
    locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run is writing {path}; wait for its end, or end it first") from None
    except OSError:
        pass


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes a folder, where it is missing, that is this run's alone meanwhile."""
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
    try:
        lock(opened, folder)
        yield
    finally:
        os.close(opened)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What the system says when a file cannot be written, in one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step: it is never seen half written."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "wb") as file:
        file.write(text.encode())
        to_disk(file)
    os.replace(new, path)
    folder_to_disk(path.parent)


def folder_to_disk(folder: Path) -> None:
    """A new name is on the disk only when its folder is."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
