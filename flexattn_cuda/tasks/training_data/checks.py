"""The check of all records before anything is trained."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.runs.records import from_line, to_line
from flexattn_cuda.runs.versions import FileVersion
from flexattn_cuda.tasks.training_data.records import Broken, BrokenRecordError, Conversation, parse

_CHUNK = 1024  # images handed to the threads at a time


@dataclass(frozen=True)
class Checked:
    """What a check has found.

    Attributes:
        broken: Every record that cannot be trained on, in their order.
        images_hash: Of the names and contents of all images that can be read.
    """

    broken: list[Broken]
    images_hash: str


def check(
    records: Sequence[Any],
    images: str | Path,
    encode: Callable[[Conversation], Any],
    verdicts: str | Path | None = None,
    progress: bool = False,
) -> Checked:
    """Find every record that cannot be trained on; each image is decoded once.

    Args:
        records: As `read_records` returns them.
        images: Folder that the paths of the images are relative to.
        encode: Called with every conversation; a BrokenRecordError or InputError that it raises is listed.
        verdicts: File that remembers the verdicts on images: one whose size and modification time are unchanged is not
            read again.
        progress: Print progress on stderr, and every broken record as soon as it is found.
    """
    run = _Check(progress)
    run.check_form(records)
    run.check_images(Path(images), verdicts)
    run.check_conversations(records, encode)
    return Checked([run.broken[number] for number in sorted(run.broken)], run.images_hash)


class _Check:
    """One check; `broken` holds the broken records by number."""

    def __init__(self, progress: bool):
        self.broken: dict[int, Broken] = {}
        self._hashes: dict[str, str] = {}  # of the images that can be read
        self._progress = progress
        self._users: dict[str, list[int]] = {}  # the records of each image

    def check_form(self, records: Sequence[Any]) -> None:
        with Progress(len(records), "records read", self._progress) as progress:
            for number, record in enumerate(records):
                try:
                    for image in parse(record).images:
                        self._users.setdefault(image, []).append(number)
                except BrokenRecordError as error:
                    self._add(number, error, progress)
                progress.advance(1)

    def check_conversations(self, records: Sequence[Any], encode: Callable[[Conversation], Any]) -> None:
        """Encode the records that are not broken yet, whose images can be read."""
        with Progress(len(records), "records checked", self._progress) as progress:
            for number, record in enumerate(records):
                try:
                    if number not in self.broken:
                        encode(parse(record))
                except BrokenRecordError as error:
                    self._add(number, error, progress)
                except InputError as error:
                    self._add(number, BrokenRecordError("conversation that cannot be asked", str(error)), progress)
                progress.advance(1)

    def check_images(self, folder: Path, remembered: str | Path | None) -> None:
        with (
            Progress(len(self._users), "images checked", self._progress) as progress,
            _Verdicts(remembered) as verdicts,
        ):
            for image, verdict in verdicts.on(folder, self._users):
                if isinstance(verdict, FileVersion):
                    self._hashes[image] = verdict.hash
                else:
                    for number in self._users[image]:
                        if number not in self.broken:
                            self._add(number, verdict, progress)
                progress.advance(1)

    @property
    def images_hash(self) -> str:
        """Of the names and contents of all images that can be read."""
        total = hashlib.sha256()
        for image in sorted(self._hashes):
            total.update(f"{image}\0{self._hashes[image]}\0".encode("utf-8", "surrogatepass"))
        return total.hexdigest()

    def _add(self, number: int, error: BrokenRecordError, progress: Progress) -> None:
        self.broken.setdefault(number, Broken.of(number, error))
        progress.say(str(self.broken[number]))


@dataclass(frozen=True)
class _Verdict:
    """A line of the file of verdicts; `error` is None for an image that can be read."""

    path: str
    version: FileVersion
    error: str | None

    @classmethod
    def from_line(cls, line: bytes) -> _Verdict | None:
        """Read a line; return None if it is damaged or its writing was cut off."""
        fields = from_line(line)
        return None if fields is None else cls(fields["path"], FileVersion(*fields["version"]), fields["error"])

    def to_line(self) -> bytes:
        return to_line({"path": self.path, "version": self.version, "error": self.error})

    def holds(self, found: os.stat_result) -> bool:
        """Whether the file is as it was, by its size and the time when it was written."""
        return (self.version.size, self.version.mtime_ns) == (found.st_size, found.st_mtime_ns)


class _Verdicts:
    """Whether images can be read, remembered in a file with one JSON object per line."""

    def __init__(self, path: str | Path | None):
        self._known: dict[str, _Verdict] = {}
        self._path = path

    def __enter__(self) -> _Verdicts:
        self._file = None
        if self._path is not None:
            self._file = open(self._path, "ab+")
            self._file.seek(0)
            for verdict in filter(None, map(_Verdict.from_line, self._file)):
                self._known[verdict.path] = verdict
            self._file.write(b"\n")  # ends a line whose writing was cut off
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def on(self, folder: Path, images: Iterable[str]) -> Iterator[tuple[str, FileVersion | BrokenRecordError]]:
        """Yield the path of every image, and its version or what is wrong with it."""
        images = iter(images)
        # Pillow decodes without holding the interpreter's lock.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            while chunk := list(islice(images, _CHUNK)):
                yield from zip(chunk, threads.map(lambda image: self._verdict(folder / image), chunk))

    def _verdict(self, path: Path) -> FileVersion | BrokenRecordError:
        try:
            verdict = self._known.get(str(path))
            if verdict is None or not verdict.holds(path.stat()):
                verdict = self._read(path)
        except FileNotFoundError as error:
            return BrokenRecordError("missing image", f"the image {path} cannot be read: {error.strerror}")
        except OSError as error:
            return BrokenRecordError("unreadable image", f"the image {path} cannot be read: {error.strerror}")
        except ValueError as error:  # a null character in the name
            return BrokenRecordError("missing image", f"the image {path} cannot be read: {error}")
        return verdict.version if verdict.error is None else BrokenRecordError("unreadable image", verdict.error)

    def _read(self, path: Path) -> _Verdict:
        """Judge an image, and remember it.

        Raises:
            OSError: If the file cannot be read.
        """
        verdict = self._known[str(path)] = _Verdict(str(path), FileVersion.of(path), _error_of_image(path))
        if self._file is not None:
            self._file.write(verdict.to_line())
        return verdict


def _error_of_image(path: Path) -> str | None:
    try:
        open_image(path)
    except InputError as error:
        return str(error)
    return None
