"""A run: start or resume, plan the batches, answer them, and write the output."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexattn_cuda import devices
from flexattn_cuda.checkpoints import adapters
from flexattn_cuda.checkpoints.files import content_hash
from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import check_writable, fsync_file, fsync_folder, os_errors_as_input_errors
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.journal import discard_journal, journal_path, journal_paths
from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.runs.records import encode_json
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks.ask_batch.answers import BatchModel
from flexattn_cuda.tasks.ask_batch.journal import KIND, Journal, read_journal
from flexattn_cuda.tasks.ask_batch.lines import Lines, Result, Results, Totals, read_lines
from flexattn_cuda.tasks.options import MAX_NEW_TOKENS, BatchOptions


@dataclass(frozen=True)
class RunState:
    """A run as process 0 starts or resumes it.

    Attributes:
        fingerprint: What a resumed run must repeat.
        lines: The lines of the input.
        results: The answers of earlier runs.
        damaged: Number of lines of their journals that were damaged, and passed over.
    """

    fingerprint: Fingerprint
    lines: Lines
    results: Results
    damaged: int = 0


def answer_file(
    input: str | Path,  # noqa: A002 (a public name)
    output: str | Path,
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    *,
    progress: bool = False,
    **options: Any,
) -> Totals:
    """Answer the questions of a JSON Lines file; call it again to resume after an interruption.

    See `answer_questions`, which takes the same as `BatchOptions`.

    Args:
        input: The questions.
        output: The answers.
        model: As in `load`.
        device: As in `load`.
        dtype: As in `load`.
        max_new_tokens: Maximum length of an answer in tokens.
        progress: Print progress on stderr.
        **options: The remaining fields of `BatchOptions`.

    Returns:
        The totals of the whole file, in every process.
    """
    chosen = BatchOptions(
        input=input,
        output=output,
        model=None if model is None else str(model),
        device="auto" if device is None else str(device),
        dtype="auto" if dtype is None else str(dtype).removeprefix("torch."),
        max_new_tokens=max_new_tokens,
        **options,
    )
    return answer_questions(chosen, progress)


def answer_questions(options: BatchOptions, progress: bool = False) -> Totals:
    """Answer the questions of a JSON Lines file as `ask` would, up to the rounding of batches.

    A line of the input is an object with "image" (a URL, or a path, absolute or relative to the file's folder),
    "question" and optionally "id" (a string or an integer). Empty lines are skipped. A line of the output, in the same
    order, is an object with the id (by default the number of the line), the image, the question and the answer, or an
    error instead: a bad line or image is reported there, and the other lines are answered.

    A run that is interrupted loses the batch that it was working on, and the next one resumes it. In a process that
    torchrun or `accelerate launch` started, this process answers its share, on the GPU of its local rank; all machines
    must then see the folder of the output.

    Args:
        options: What to answer, and how. Batch size and device may change when a run is resumed.
        progress: Print progress on stderr.

    Returns:
        The totals of the whole file, in every process.

    Raises:
        CheckpointError: If there is no such checkpoint, or it cannot be loaded.
        InputError: If the input cannot be read, the output exists, an earlier run had other options, or an option
            cannot be used.
    """
    devices.choose_dtype(options.dtype)
    with Processes() as processes:
        device = processes.device(options.device)
        state = processes.broadcast_from_rank0(lambda: _start_or_resume(options))
        loaded = loading.load(options.model, device, options.dtype, adapter=options.adapter, quantize=options.quantize)
        batch_model = BatchModel(*loaded, options.input.parent, options.batch_size, options.max_new_tokens)
        plan = processes.broadcast_from_rank0(lambda: batch_model.plan(state.lines, state.results))
        share = plan.batches[processes.rank :: processes.count]
        what = "questions" if processes.count == 1 else f"questions of the first of {processes.count} processes"
        shown = Progress(sum(map(len, share)), what, progress and processes.rank == 0)
        if state.damaged:
            shown.say(f"{state.damaged} damaged lines of the journals were passed over; what they held is asked again")
        if state.results:
            shown.say(f"resuming: {len(state.results)} questions are answered, {sum(map(len, plan.batches))} are left")
        answered: Results = {}
        if share:
            with Journal(journal_path(options.output, processes.rank), state.fingerprint) as journal, shown:
                answered = batch_model.answer_share(state.lines, share, journal.append_results, shown)
        results = state.results | plan.too_long
        for part in processes.gather_to_rank0(answered):
            results |= part
        totals = processes.broadcast_from_rank0(lambda: _finish(options.output, state.lines, results, processes.count))
        shown.say(f"wrote {options.output}: answers {totals.answers}, errors {totals.errors}")
        return totals


# --------------------------------------------------------------------------------------------------------------- start


def _start_or_resume(options: BatchOptions) -> RunState:
    """Check input, output and journals, and read the results of earlier runs."""
    content = _read_input(options.input)
    lines = read_lines(content)
    if not lines:
        raise InputError(f"{options.input} holds no questions")
    _check_output(options)
    fingerprint = options.fingerprint().with_facts(
        input={
            "path": os.path.relpath(options.input, options.output.parent),
            "hash": hashlib.blake2b(content).hexdigest(),
        },
        model=content_hash(loading.checkpoint_folder(options.model)),
        adapter=None if options.adapter is None else content_hash(adapters.find(options.adapter)),
    )
    if options.restart:
        for path in journal_paths(options.output):
            discard_journal(path, KIND)
        options.output.unlink(missing_ok=True)
        return RunState(fingerprint, lines, {})
    journals = [read_journal(path, fingerprint) for path in journal_paths(options.output)]
    results = {number: result for journal in journals for number, result in journal.answers.items()}
    _require_same_images(options, lines, results)
    return RunState(fingerprint, lines, results, sum(journal.damaged for journal in journals))


def _require_same_images(options: BatchOptions, lines: Lines, results: Results) -> None:
    """Raise InputError if an image that was asked about has changed since: old and new answers would be mixed."""
    asked = {(lines[number].source(options.input.parent), result.image) for number, result in results.items()}
    changed = [path for path, version in asked if isinstance(path, Path) and version and not version.is_still(path)]
    if changed:
        raise InputError(
            f"{len(changed)} images have changed since they were asked about, the first is {min(changed)}; put the old "
            "ones back to resume the unfinished run, or discard it with --restart"
        )


def _read_input(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _check_output(options: BatchOptions) -> None:
    output = options.output
    check_writable(output)
    if output.exists() and output.samefile(options.input):
        raise InputError(f"{output} would overwrite the questions; choose another name")
    if output.exists() and not options.restart:
        raise InputError(
            f"{output} already exists, so there is nothing to do; pass --restart to answer everything again"
        )


# ----------------------------------------------------------------------------------------------------------- finish


def _finish(output: Path, lines: Lines, results: Results, processes: int) -> Totals:
    """Write the output in one step, and remove the journals."""
    results = {n: results[n] if line.error is None else Result(error=line.error) for n, line in lines.items()}
    merged = output.with_name(f"{output.name}.partial.merged")
    with os_errors_as_input_errors(merged), open(merged, "wb") as file:
        for number, line in lines.items():
            record = {"id": line.id, "image": line.image, "question": line.question} | results[number].fields()
            file.write(encode_json(record) + b"\n")
        fsync_file(file)
    with os_errors_as_input_errors(output):
        os.replace(merged, output)
        fsync_folder(output.parent)
        # Journals of other machines may not be listed here yet, but they can be removed by name.
        for path in {*journal_paths(output), *(journal_path(output, rank) for rank in range(processes))}:
            path.unlink(missing_ok=True)
    return Totals.of(results.values())
