"""A file of questions about photographs, answered in batches: through interruptions, on one GPU or on many.

questions.jsonl ─ checked, sorted by prompt length, cut into batches that are dealt to the processes
    ─► answers.jsonl.partial.RANK  a journal of each process, on the disk after every batch
    ─► answers.jsonl               in the order of the questions, in one step, when all are answered

A run that was ended, however it ended, goes on from the journals of all processes, whatever their number was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from flexattn_cuda import checkpoints, devices
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.inputs.questions import check_question
from flexattn_cuda.runs.files import folder_to_disk, lock, to_disk, told
from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import load as loading

_JOURNAL = "journal of flexattn ask-batch, 1"
_CHECKPOINT_FILES = (".json", ".jinja", ".model", ".safetensors", ".bin")

Results = dict[int, dict[str, str]]  # by line number, {"answer": text} or {"error": sentence}


@dataclass(frozen=True)
class Totals:
    """How many lines of the output hold an answer, and how many an error."""

    answers: int
    errors: int


def answer_file(
    input: str | Path,
    output: str | Path,
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    restart: bool = False,
    progress: bool = False,
) -> Totals:
    """Answers the questions of a JSONL file. The answers are those of `ask`, but for the rounding of batches.

    Input: one object a line with "image" (a path, absolute or relative to the file's folder), "question" and, if wanted,
    "id" (a string or an integer). Empty lines are passed over. Output: one object a line in the same order with id (the
    line's number where none was given), image, question and answer, or error, one sentence, in place of the answer: what
    is wrong with a line or its image costs that line alone.

    A run that is ended in between loses the batch under way; the next one goes on. In a process that torchrun or
    `accelerate launch` started, this process answers its share, on the GPU of its local rank; the output's folder must
    then be one that all machines see.

    Args:
        model, device, dtype: As in `load`.
        max_new_tokens: An answer's greatest length.
        batch_size: Questions answered at a time. It may change between runs, as may the device.
        restart: Discard what an earlier run has answered, and its output.
        progress: Tell on stderr how far it is.
    Returns:
        The totals of the whole file, in every process.
    Raises:
        CheckpointError: There is no such checkpoint, or it cannot be loaded.
        InputError: The file cannot be read, the output is there already, an earlier run was one of another file, model
            or settings, or an option cannot be used.
    """
    input, output = Path(input), Path(output)
    answering.check_max_new_tokens(max_new_tokens)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; it must be at least 1")
    settings = {
        "dtype": str(devices.choose_dtype(dtype) or "auto").removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
    }
    with Processes() as processes:
        device = processes.device(device)
        header, lines, results = processes.broadcast_from_rank0(lambda: _begin(input, output, model, settings, restart))
        loaded, processor = loading.load(model, device, dtype)
        batches, too_long = processes.broadcast_from_rank0(lambda: _plan(loaded, processor, lines, results, batch_size))
        share = batches[processes.rank :: processes.count]
        what = "questions" if processes.count == 1 else f"questions of the first of {processes.count} processes"
        report = Progress(sum(map(len, share)), what, progress and processes.rank == 0)
        if results:
            report.say(f"{len(results)} questions were answered before, {sum(map(len, batches))} are left")

        answered: Results = {}
        if share:
            with _Journal(_journal_path(output, processes.rank), header) as journal, report:
                for batch in share:
                    asked = {number: lines[number] for number in batch}
                    new = _answer(loaded, processor, input.parent, asked, max_new_tokens)
                    journal.append(new)
                    answered |= new
                    report.advance(len(batch))

        for part in processes.gather_to_rank0(answered):
            results |= part
        totals = processes.broadcast_from_rank0(lambda: _finish(output, lines, results | too_long, processes.count))
        report.say(f"wrote {output}: answers {totals.answers}, errors {totals.errors}")
        return totals


# --------------------------------------------------------------------------------------------------------------- lines


@dataclass(frozen=True)
class _Line:
    """A line of the input; `error` is set where nothing can be asked."""

    id: str | int
    image: str | None = None
    question: str | None = None
    error: str | None = None


def _read_lines(content: bytes) -> dict[int, _Line]:
    """The lines by their numbers, which count from 1 and count empty ones too."""
    texts = enumerate(content.split(b"\n"), start=1)
    return {number: _read_line(text, number) for number, text in texts if text.strip()}


def _read_line(text: bytes, number: int) -> _Line:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _Line(number, error=f"the line is not JSON: {getattr(error, 'msg', error)}")
    if not isinstance(record, dict):
        return _Line(number, error="the line is not a JSON object with an image and a question")
    id, image, question = record.get("id"), record.get("image"), record.get("question")
    known = isinstance(id, (str, int)) and not isinstance(id, bool)
    error = None
    if id is not None and not known:
        error = '"id" is neither a string nor an integer'
    for name in ("image", "question"):
        if error is None and not isinstance(record.get(name), str):
            error = f'"{name}" is not a string' if name in record else f'there is no "{name}"'
    if error is None:
        try:
            check_question(question)
            question.encode()
        except UnicodeEncodeError:
            error = "the question holds half of a surrogate pair, which is no character"
        except InputError as refused:
            error = str(refused)
    texts = (value if isinstance(value, str) else None for value in (image, question))
    return _Line(id if known else number, *texts, error)


def _usable(lines: dict[int, _Line]) -> set[int]:
    return {number for number, line in lines.items() if line.error is None}


def _encoded(record: dict[str, Any]) -> bytes:
    """A line of JSON. Half a surrogate pair, which UTF-8 cannot hold, becomes the escape that JSON has for it."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


# ------------------------------------------------------------------------------------------- what the first process does


def _begin(
    input: Path, output: Path, model: str | Path | None, settings: dict[str, Any], restart: bool
) -> tuple[dict[str, Any], dict[int, _Line], Results]:
    """Checks input, output and journals. Returns the journals' header, the lines, and the results of earlier runs."""
    try:
        content = input.read_bytes()
    except OSError as error:
        raise InputError(f"{input} cannot be read: {error.strerror}") from None
    lines = _read_lines(content)
    if not lines:
        raise InputError(f"{input} holds no questions")
    answering.check_writable(output)
    if output.exists() and output.samefile(input):
        raise InputError(f"{output} would overwrite the questions; choose another name")
    if output.exists() and not restart:
        raise InputError(
            f"{output} is there already, so there is nothing to do; to answer everything again, use --restart"
        )
    header = {
        "format": _JOURNAL,
        "input": {
            "path": os.path.relpath(input, output.parent),
            "hash": hashlib.blake2b(content).hexdigest(),
        },
        "model": _checkpoint_hash(checkpoints.resolve_folder(loading.DEFAULT_MODEL if model is None else model)),
    } | settings
    results: Results = {}
    for path in _journal_paths(output):
        if restart:
            _discard(path)
        else:
            results |= _read_journal(path, header)
    if restart:
        output.unlink(missing_ok=True)
    return header, lines, results


def _checkpoint_hash(folder: Path) -> str:
    """Of everything that makes a model's answers, wherever the folder lies."""
    total = hashlib.blake2b()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _CHECKPOINT_FILES and path.is_file()):
        one = hashlib.blake2b()
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                one.update(part)
        total.update(path.name.encode("utf-8", "surrogateescape") + one.digest())
    return total.hexdigest()


def _plan(
    model: FlexAttnLlavaForConditionalGeneration,
    processor: FlexAttnLlavaProcessor,
    lines: dict[int, _Line],
    results: Results,
    batch_size: int,
) -> tuple[list[list[int]], Results]:
    """Batches of line numbers that are still to be answered, and the lines that the model has no room for.

    Prompts of about the same length make a batch, so that little of it is padding. The longest come first: what does not
    fit into the memory fails at once.
    """
    lengths: dict[int, int] = {}
    too_long: Results = {}
    for number in sorted(_usable(lines) - results.keys()):
        try:
            lengths[number] = answering.prompt_length(model, processor, lines[number].question)
        except InputError as error:
            too_long[number] = {"error": str(error)}
    order = sorted(lengths, key=lambda number: (-lengths[number], number))
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)], too_long


def _finish(output: Path, lines: dict[int, _Line], results: Results, processes: int) -> Totals:
    """Writes the output, in one step, and removes the journals."""
    errors = 0
    merged = output.with_name(f"{output.name}.partial.merged")
    with told(merged), open(merged, "wb") as file:
        for number, line in lines.items():
            result = results[number] if line.error is None else {"error": line.error}
            errors += "error" in result
            file.write(_encoded({"id": line.id, "image": line.image, "question": line.question} | result))
        to_disk(file)
    with told(output):
        os.replace(merged, output)
        folder_to_disk(output.parent)
        # Another machine's new files may not be listed here yet, but they can be removed by name.
        for path in {
            *_journal_paths(output),
            *(_journal_path(output, rank) for rank in range(processes)),
        }:
            path.unlink(missing_ok=True)
    return Totals(len(lines) - errors, errors)


# ---------------------------------------------------------------------------------------------------------------- answers


def _answer(
    model: FlexAttnLlavaForConditionalGeneration,
    processor: FlexAttnLlavaProcessor,
    folder: Path,
    lines: dict[int, _Line],
    max_new_tokens: int,
) -> Results:
    """The results of one batch. Its images are in memory from here on, and only until it is answered."""
    results: Results = {}
    images = {}
    for number, line in lines.items():
        try:
            images[number] = open_image(folder / line.image)
        except InputError as error:
            results[number] = {"error": " ".join(str(error).split())}
    if not images:
        return results
    questions = [lines[number].question for number in images]
    try:
        answers = answering.generate_answers(model, processor, [*images.values()], questions, max_new_tokens)
    except torch.OutOfMemoryError:
        raise InputError(
            f"the GPU's memory is too small for {len(images)} questions at a time; use a smaller batch size, "
            "what has been answered is kept"
        ) from None
    return results | {number: {"answer": answering.answer_text(processor, one)} for number, one in zip(images, answers)}


# --------------------------------------------------------------------------------------------------------------- journals


def _journal_path(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.partial.{rank}")


def _journal_paths(output: Path) -> list[Path]:
    """The journals that are there, of any number of processes."""
    name = re.compile(re.escape(output.name) + r"\.partial\.[0-9]+")
    return sorted(path for path in output.parent.iterdir() if name.fullmatch(path.name))


class _Journal:
    """Results as they come: a header, then one JSON object a line. What `append` has written outlives this process."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self._path = path
        with told(path):
            self._file = open(path, "ab")
            lock(self._file, path)
            if self._file.tell() == 0:
                self._write(_encoded(header))
                folder_to_disk(path.parent)

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, results: Results) -> None:
        with told(self._path):
            self._write(b"".join(_encoded({"line": number} | result) for number, result in results.items()))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        to_disk(self._file)


def _read_journal(path: Path, header: dict[str, Any]) -> Results:
    """The results in a journal. What was being written when its process ended is cut off, so that it can be continued."""
    results: Results = {}
    with told(path), open(path, "rb+") as file:
        first = _header_line(file, path)
        if first and (found := json.loads(first)) != header:
            changed = ", ".join(name for name in header if found.get(name) != header[name])
            raise InputError(
                f"{path} was begun with another {changed}; go on with the same, or discard it with --restart"
            )
        whole = len(first)
        for text in file:
            try:
                record = json.loads(text)
                number = record.pop("line")
            except (ValueError, TypeError, KeyError, AttributeError):
                break
            if not text.endswith(b"\n"):
                break
            results[number] = record
            whole += len(text)
        file.truncate(whole)
        to_disk(file)
    return results


def _discard(path: Path) -> None:
    with told(path), open(path, "rb") as file:
        _header_line(file, path)
        path.unlink()


def _header_line(file: BinaryIO, path: Path) -> bytes:
    """The first line of a journal, empty where its writing was cut off; InputError where this is something else."""
    lock(file, path)
    first = file.readline()
    mark = _encoded({"format": _JOURNAL}).rstrip(b"}\n")
    if first[: len(mark)] != mark[: len(first)]:
        raise InputError(f"{path} is in the way: it is not a journal of this program; move it elsewhere")
    return first if first.endswith(b"\n") else b""
