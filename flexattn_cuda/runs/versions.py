"""Versions of files: has an input changed since it was read?"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple


class FileVersion(NamedTuple):
    """A file in one of its states.

    Attributes:
        size: In bytes.
        mtime_ns: When it was last written.
        hash: SHA-256 of its content.
    """

    size: int
    mtime_ns: int
    hash: str

    @classmethod
    def of(cls, path: Path) -> FileVersion:
        """Read a file.

        Raises:
            OSError: If it cannot be read.
        """
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, file_hash(path))

    def is_still(self, path: Path) -> bool:
        """Return whether a file has this content. It is read only if it was written since and has the same size."""
        try:
            found = path.stat()
            if found.st_size != self.size:
                return False
            return found.st_mtime_ns == self.mtime_ns or file_hash(path) == self.hash
        except (OSError, ValueError):  # ValueError: a null character in the name
            return False


def file_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, which most processors compute faster than they decode an image."""
    total = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()
