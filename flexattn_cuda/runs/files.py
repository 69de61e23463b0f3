"""Files that survive a crash, and folders that one run writes at a time."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flexattn_cuda.errors import InputError


def lock(file: IO[bytes] | int, path: Path) -> None:
    """Lock an open file, or a folder by its descriptor, until it is closed.

    Does nothing on file systems without locks.

    Raises:
        InputError: If another run holds the lock; `path` is named in the message.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run is writing {path}; wait for it to finish, or stop it first") from None
    except OSError:
        pass


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create a folder if it is missing, and lock it for this run."""
    with os_errors_as_input_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def os_errors_as_input_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into an InputError that says why `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def make_writable_folder(folder: Path) -> None:
    """Create a folder if it is missing; raise InputError if it cannot be created or written."""
    with os_errors_as_input_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written: permission denied")


def check_readable(path: Path) -> None:
    """Raise InputError if there is no file at `path` that can be read."""
    try:
        open(path, "rb").close()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def check_writable(path: Path) -> None:
    """Raise InputError if no file can be written at `path`."""
    if path.is_dir() or not path.parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"{path} cannot be written: {reason}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: permission denied")


def check_image_path(path: str | Path) -> None:
    """Raise InputError if no image can be saved at `path`."""
    from PIL import Image  # not needed by those who write other files

    path = Path(path)
    Image.init()
    savable = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in savable:
        raise InputError(f"{path} does not have the extension of an image file; use .png or .jpg")
    check_writable(path)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, so that nobody ever sees it half written."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "wb") as file:
        file.write(text.encode())
        fsync_file(file)
    os.replace(new, path)
    fsync_folder(path.parent)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Replace a CSV file in one step; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def fsync_file(file: IO[bytes]) -> None:
    """Flush a file to disk."""
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Flush a folder to disk; only then is a new file in it certain to survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
