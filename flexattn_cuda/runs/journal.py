"""Journals: what a run has done so far, one file per process, so that it can be resumed.

A journal is a header, which identifies the run, and lines of records. Every line carries a checksum (`runs.records`),
and that of a record counts on from the header's: a line of another run is as good as damaged.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import fsync_file, fsync_folder, lock, os_errors_as_input_errors
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.records import encode_json, from_line, to_line


def journal_path(output: Path, rank: int) -> Path:
    """Return the path of the journal of a process."""
    return output.with_name(f"{output.name}.partial.{rank}")


def journal_paths(output: Path) -> list[Path]:
    """Return the journals that exist, whatever the number of processes was."""
    name = re.compile(re.escape(output.name) + r"\.partial\.[0-9]+")
    return sorted(path for path in output.parent.iterdir() if name.fullmatch(path.name))


@dataclass(frozen=True)
class JournalKind:
    """What journals of a command have in common.

    Attributes:
        name: Of the kind, which no other begins with.
        version: Of its records.
    """

    name: str
    version: int

    @property
    def format(self) -> str:
        """What the header says."""
        return f"{self.name}, {self.version}"

    @property
    def beginning(self) -> bytes:
        """What journals of every version begin with."""
        return encode_json({"format": self.name}).rstrip(b'"}')

    def header(self, fingerprint: Fingerprint) -> bytes:
        """Return the header of a run."""
        return to_line({"format": self.format} | dict(fingerprint.facts))

    def check_beginning(self, line: bytes, path: Path) -> None:
        """Raise InputError unless a line may be the header of a journal, or as much of it as was written."""
        if line[: len(self.beginning)] != self.beginning[: len(line)]:
            raise InputError(
                f"{path} is not a journal of this program, which would be written there; move it elsewhere"
            )


class Journal:
    """A journal that is open for writing; what `append` has written survives this process."""

    def __init__(self, path: Path, kind: JournalKind, fingerprint: Fingerprint):
        self._path, self._header = path, kind.header(fingerprint)

    def __enter__(self) -> Journal:
        with os_errors_as_input_errors(self._path):
            self._file = open(self._path, "ab", buffering=0)  # a buffer would be written again after a full disk
            lock(self._file, self._path)
            if self._file.tell() == 0:
                self._write(self._header)
                fsync_folder(self._path.parent)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records to the disk, a line each."""
        key = zlib.crc32(self._header)
        with os_errors_as_input_errors(self._path):
            self._write(b"".join(to_line(record, key) for record in records))

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]
        fsync_file(self._file)


@dataclass(frozen=True)
class Journalled:
    """What a journal holds: the records, and the number of lines that were damaged."""

    records: list[dict[str, Any]]
    damaged: int


def read_journal(path: Path, kind: JournalKind, fingerprint: Fingerprint) -> Journalled:
    """Read a journal, and cut off a line whose writing was interrupted, so that it can be continued.

    Damaged lines stay where they are and are passed over.

    Raises:
        InputError: If another run is writing the journal, or it is not one of this fingerprint.
    """
    with os_errors_as_input_errors(path), open(path, "rb+") as file:
        lock(file, path)
        lines = file.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            torn = lines.pop()
            if not lines:
                kind.check_beginning(torn, path)
            file.truncate(file.tell() - len(torn))
            fsync_file(file)
    if not lines:
        return Journalled([], 0)
    header, *rest = lines
    facts = from_line(header)
    if facts is not None and facts.get("format") == kind.format:
        fingerprint.require_same(Fingerprint(facts), f"{path}, an unfinished run,")
        damaged_header = 0
    else:  # what follows tells whether it is of this run
        header, damaged_header = kind.header(fingerprint), 1
    read = [from_line(line, zlib.crc32(header)) for line in rest]
    records = [record for record in read if record is not None]
    if damaged_header and not records:
        kind.check_beginning(lines[0], path)
        raise InputError(
            f"{path}, an unfinished run, is damaged or of an earlier version of this program, and cannot be resumed; "
            "discard it with --restart"
        )
    return Journalled(records, read.count(None) + damaged_header)


def discard_journal(path: Path, kind: JournalKind) -> None:
    """Remove a journal; raise InputError if the file is something else, or another run is writing it."""
    with os_errors_as_input_errors(path), open(path, "rb") as file:
        lock(file, path)
        kind.check_beginning(file.readline(), path)
        path.unlink()
