"""The study: every system fine-tuned from one start, asked the same questions, for several seeds.

    OUT/seed-N/start/           encoder and low-resolution stage of the seed, shared by its systems: a checkpoint
    OUT/seed-N/images.pt      encoded images to train on, and those that are asked about (questions.pt)
    OUT/seed-N/SYSTEM/          the fine-tuned model and its processor, for `flexattn ask --model`
    OUT/seed-N/SYSTEM.json      what it answered; written last, so a system without it is taken up again
    OUT/results/                tables, figures and the report (report.py); all that is worth keeping

A unit of work is a seed's start or one system of a seed. Each runs in one thread of a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import locked_folder
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.tasks.train import require_accelerate
from studies.small import pretraining
from studies.small.collection import collect
from studies.small.figures import require_matplotlib
from studies.small.finetuning import run_system
from studies.small.presets import PRESETS, SYSTEMS
from studies.small.report import write_report
from studies.small.scenes import find_photographs, photograph_files
from studies.small.start import make_start


def study(
    output: Path,
    photographs: Sequence[Path],
    preset: str = "small",
    seeds: Sequence[int] = (0, 1, 2),
    systems: Sequence[str] = SYSTEMS,
    jobs: int | None = None,
    command: str = "",
    progress: bool = False,
    examples: Sequence[int] | None = None,
) -> Path:
    """Runs what is not done yet of all seeds and systems, then writes the report.

    Args:
        output: A folder, see above; called again with it, the study goes on.
        photographs: Folders of JPEG files; every fourth, by name, is held out for the questions.
        preset: A key of PRESETS.
        jobs: Processes at a time; by default as many as there are cores.
        command: How the study was called, for the report.
        progress: Tell on stderr how far it is.
        examples: Numbers, as in answers.csv, of the lowest seed's questions that the report shows; by default the first of each
            task about small objects.
    Returns:
        The report's path.
    Raises:
        InputError: Something cannot be used, an earlier study in `output` had other settings, another process is writing there,
            or a process of the study was killed.
    """
    if preset not in PRESETS:
        raise InputError(f"the preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    if unknown := sorted(set(systems) - set(SYSTEMS)):
        raise InputError(f"there is no system {unknown[0]!r} in the study; allowed: {', '.join(SYSTEMS)}")
    if not seeds or not systems:
        raise InputError("a study needs a seed and a system at least")
    if jobs is not None and jobs < 1:
        raise InputError(f"the number of jobs is {jobs}; it must be at least 1")
    for number in examples or ():
        if not 0 <= number < PRESETS[preset].questions:
            raise InputError(
                f"there is no question {number}; the preset {preset!r} has {PRESETS[preset].questions}, numbered from 0"
            )
    require_matplotlib()
    require_accelerate()
    pretraining.require_muon()
    for held_out in (True, False):
        find_photographs(photographs, held_out)  # before anything is begun
    settings = {
        "preset": {"name": preset, **asdict(PRESETS[preset])},
        "photographs": _digest(photographs),
    }
    with locked_folder(output):
        _same_settings(output, settings)
        _run(
            output,
            list(photographs),
            preset,
            list(dict.fromkeys(seeds)),
            list(dict.fromkeys(systems)),
            jobs,
            progress,
        )
        return write_report(collect(output, photographs, preset, command, examples))


def _digest(photographs: Sequence[Path]) -> str:
    """Of the files' names and sizes in bytes."""
    files = [(path.name, path.stat().st_size) for path in photograph_files(photographs)]
    return hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest()


def _same_settings(output: Path, settings: dict[str, Any]) -> None:
    written = output / "study.json"
    try:
        if not written.exists():
            written.write_text(json.dumps(settings))
        before = json.loads(written.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{output} cannot be used for a study: {error}") from None
    if before != json.loads(json.dumps(settings)):
        raise InputError(
            f"the study in {output} was begun with another preset or other photographs; choose another folder"
        )


def _run(
    output: Path,
    photographs: list[Path],
    preset: str,
    seeds: list[int],
    systems: list[str],
    jobs: int | None,
    progress: bool,
) -> None:
    """The units that are not done, starts first, several at a time. What one says is told; one that fails ends the study."""
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    with (
        Progress(len(seeds) * (1 + len(systems)), "units", progress) as report,
        _pool(jobs, context, said) as pool,
    ):
        running: dict[Future, tuple[int, str]] = {}

        def submit(seed: int, unit: str) -> None:
            running[pool.submit(_unit, output / f"seed-{seed}", seed, unit, photographs, preset)] = seed, unit

        for seed in seeds:
            submit(seed, "start")
        while running:
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            while not said.empty():
                report.say(said.get())
            for future in done:
                seed, unit = running.pop(future)
                future.result()
                report.advance(1)
                if unit == "start":
                    for system in systems:
                        submit(seed, system)


@contextmanager
def _pool(jobs: int | None, context: Any, said: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end at once with an error or Ctrl-C here: what they have begun is taken up again."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs or len(os.sched_getaffinity(0)), context, _begin_process, (said,))
    try:
        yield pool
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                "a process of the study was killed, perhaps for lack of memory; the same command goes on"
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_said: Any = None  # in a process of the pool: the queue of what it tells


def _begin_process(said: Any) -> None:
    global _said
    _said = said
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study ends its processes itself
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pretraining.console.quiet = True  # what it tells goes through the queue


def _end_with_the_study() -> None:
    """Where it was killed: nothing may go on writing into a folder that another study can lock by now."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _unit(folder: Path, seed: int, unit: str, photographs: list[Path], preset: str) -> None:
    """Does a unit that has not been done; in a process of the pool."""

    def tell(text: str) -> None:
        _said.put(f"{folder.name} {unit}: {text}")

    folder.mkdir(exist_ok=True)
    if unit == "start" and not (folder / "start").exists():
        make_start(folder, seed, PRESETS[preset], photographs, tell)
    elif unit != "start" and not (folder / f"{unit}.json").exists():
        run_system(folder, seed, unit, PRESETS[preset], tell)
