"""Journals: the answers of a run while it lasts, one file per process.

A journal is a header, which identifies the run, and a line for each answer, with the number of its question and the
version of its image. Every line carries a checksum (`runs.records`), and that of an answer counts on from the header's:
a line of another run is as good as damaged.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import fsync_file, fsync_folder, lock, os_errors_as_input_errors
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.records import encode_json, from_line, to_line
from flexattn_cuda.runs.versions import FileVersion
from flexattn_cuda.tasks.ask_batch.lines import Result, Results

_NAME = "journal of flexattn ask-batch"
_FORMAT = f"{_NAME}, 2"
_BEGINNING = encode_json({"format": _NAME}).rstrip(b'"}')  # of every format


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
        self._path, self._header = path, _header(fingerprint)

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

    def append(self, results: Results) -> None:
        """Write the answers among some results to the disk; a line that failed is tried again by the next run."""
        key = zlib.crc32(self._header)
        answers = {number: result for number, result in results.items() if result.answer is not None}
        with os_errors_as_input_errors(self._path):
            self._write(b"".join(to_line(_fields(number, result), key) for number, result in answers.items()))

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]
        fsync_file(self._file)


@dataclass(frozen=True)
class Journalled:
    """What a journal holds: the answers, and the number of lines that were damaged."""

    answers: Results
    damaged: int


def read_journal(path: Path, fingerprint: Fingerprint) -> Journalled:
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
                _check_beginning(torn, path)
            file.truncate(file.tell() - len(torn))
            fsync_file(file)
    if not lines:
        return Journalled({}, 0)
    header, *records = lines
    facts = from_line(header)
    if facts is not None and facts.get("format") == _FORMAT:
        fingerprint.require_same(Fingerprint(facts), f"{path}, an unfinished run,")
        damaged_header = 0
    else:  # what follows tells whether it is of this run
        header, damaged_header = _header(fingerprint), 1
    answers, damaged = _read_answers(records, zlib.crc32(header))
    if damaged_header and not answers:
        _check_beginning(lines[0], path)
        raise InputError(
            f"{path}, an unfinished run, is damaged or of an earlier version of this program, and cannot be resumed; "
            "discard it with --restart"
        )
    return Journalled(answers, damaged + damaged_header)


def discard_journal(path: Path) -> None:
    """Remove a journal; raise InputError if the file is something else, or another run is writing it."""
    with os_errors_as_input_errors(path), open(path, "rb") as file:
        lock(file, path)
        _check_beginning(file.readline(), path)
        path.unlink()


def _check_beginning(line: bytes, path: Path) -> None:
    """Raise InputError unless a line may be the header of a journal, or as much of it as was written."""
    if line[: len(_BEGINNING)] != _BEGINNING[: len(line)]:
        raise InputError(f"{path} is not a journal of this program, which would be written there; move it elsewhere")


def _header(fingerprint: Fingerprint) -> bytes:
    return to_line({"format": _FORMAT} | dict(fingerprint.facts))


def _fields(number: int, result: Result) -> dict[str, Any]:
    return {"line": number, "answer": result.answer, "image": result.image}


def _read_answers(lines: list[bytes], key: int) -> tuple[Results, int]:
    """Return the answers, and the number of damaged lines."""
    records = [from_line(line, key) for line in lines]
    answers = {
        record["line"]: Result(record["answer"], image=record["image"] and FileVersion(*record["image"]))
        for record in records
        if record is not None
    }
    return answers, records.count(None)
