"""Journals: the results of a run while it lasts, one file per process.

A journal is a header, which identifies the run, and one JSON object per line with the number of a line and its result.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import fsync_file, fsync_folder, lock, os_errors_as_input_errors
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.tasks.ask_batch.lines import Result, Results, encode_json

_FORMAT = "journal of flexattn ask-batch, 1"


def journal_path(output: Path, rank: int) -> Path:
    """Return the path of the journal of a process."""
    return output.with_name(f"{output.name}.partial.{rank}")


def journal_paths(output: Path) -> list[Path]:
    """Return the journals that exist, whatever the number of processes was."""
    name = re.compile(re.escape(output.name) + r"\.partial\.[0-9]+")
    return sorted(path for path in output.parent.iterdir() if name.fullmatch(path.name))


class Journal:
    """A journal that is open for writing; what `append` has written survives this process."""

    def __init__(self, path: Path, fingerprint: Fingerprint):
        self._path, self._fingerprint = path, fingerprint

    def __enter__(self) -> Journal:
        with os_errors_as_input_errors(self._path):
            self._file = open(self._path, "ab")
            lock(self._file, self._path)
            if self._file.tell() == 0:
                self._write(encode_json({"format": _FORMAT} | dict(self._fingerprint.facts)))
                fsync_folder(self._path.parent)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, results: Results) -> None:
        """Write results to the disk."""
        with os_errors_as_input_errors(self._path):
            self._write(b"".join(_Entry(number, result).to_line() for number, result in results.items()))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        fsync_file(self._file)


def read_journal(path: Path, fingerprint: Fingerprint) -> Results:
    """Return the results in a journal, and cut off a line whose writing was interrupted, so that it can be continued.

    Raises:
        InputError: If another run is writing the journal, or it is not one of this fingerprint.
    """
    results: Results = {}
    with os_errors_as_input_errors(path), open(path, "rb+") as file:
        header = _read_header(file, path)
        if header:
            fingerprint.require_same(Fingerprint(json.loads(header)), f"{path}, an unfinished run,")
        length = len(header)
        for line in file:
            entry = _Entry.from_line(line)
            if entry is None:
                break
            results[entry.number] = entry.result
            length += len(line)
        file.truncate(length)
        fsync_file(file)
    return results


def discard_journal(path: Path) -> None:
    """Remove a journal; raise InputError if the file is something else, or another run is writing it."""
    with os_errors_as_input_errors(path), open(path, "rb") as file:
        _read_header(file, path)
        path.unlink()


def _read_header(file: BinaryIO, path: Path) -> bytes:
    """Lock a journal and return its first line, or nothing if the writing of that was interrupted."""
    lock(file, path)
    header = file.readline()
    beginning = encode_json({"format": _FORMAT}).rstrip(b"}\n")
    if header[: len(beginning)] != beginning[: len(header)]:
        raise InputError(f"{path} is not a journal of this program, which would be written there; move it elsewhere")
    return header if header.endswith(b"\n") else b""


@dataclass(frozen=True)
class _Entry:
    """A line of a journal."""

    number: int
    result: Result

    def to_line(self) -> bytes:
        return encode_json({"line": self.number} | self.result.fields())

    @classmethod
    def from_line(cls, line: bytes) -> _Entry | None:
        """Read a line; return None if its writing was interrupted."""
        if not line.endswith(b"\n"):
            return None
        try:
            fields = json.loads(line)
            return cls(fields.pop("line"), Result(**fields))
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
