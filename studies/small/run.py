"""Runs the study: every system fine-tuned from one start and asked the same questions, for several seeds.

    OUT/study.json              settings, which a resumed study must repeat
    OUT/seed-N/start/           encoder and low-resolution stages of the seed, shared by its systems: a checkpoint
    OUT/seed-N/images.pt        encoded images to train on; questions.pt holds those that are asked about
    OUT/seed-N/SYSTEM/          the fine-tuned model and its processor, for `flexattn ask --model`
    OUT/seed-N/SYSTEM.json      its answers; written last, so a system without it is resumed
    OUT/results/                tables, figures and the report (report.py): all that is worth keeping

A unit of work is a seed's start or one system of a seed. Each runs in a single-threaded process of its own.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.files import locked_folder
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.tasks.train import require_accelerate
from studies.small.collection import collect
from studies.small.figures import require_matplotlib
from studies.small.finetuning import run_system
from studies.small.optimizer import require_muon
from studies.small.options import StudyOptions
from studies.small.photographs import find_photographs, photograph_files
from studies.small.presets import Preset
from studies.small.report import write_report
from studies.small.stage import console
from studies.small.start import make_start

FORMAT = 2  # of the files in OUT/seed-N; another version cannot resume a study
_START = "start"


@dataclass(frozen=True)
class Unit:
    """A seed's start, or one system of a seed.

    Attributes:
        output: The study's folder.
        seed: The seed.
        name: "start", or the system.
    """

    output: Path
    seed: int
    name: str

    @property
    def folder(self) -> Path:
        """The seed's folder."""
        return self.output / f"seed-{self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether its last file is there."""
        return (self.folder / (_START if self.name == _START else f"{self.name}.json")).exists()


def study(options: StudyOptions, command: str = "", progress: bool = False) -> Path:
    """Run what is not done yet of all seeds and systems, then write the report. Call again to resume.

    Every fourth photograph, by name, is held out for the questions.

    Args:
        options: What to run.
        command: The command that runs the study, for the report.
        progress: Print progress to stderr.

    Returns:
        The path of the report.

    Raises:
        InputError: If a photograph or the output folder cannot be used, a package is missing, the study in the folder
            has other settings, another process is writing there, or a process of the study was killed.
    """
    require_matplotlib()
    require_accelerate()
    require_muon()
    for held_out in (True, False):
        find_photographs(options.photographs, held_out)  # before any work
    with locked_folder(options.output):
        _check_settings(options)
        _run_units(options, progress)
        return write_report(collect(options, command))


def _check_settings(options: StudyOptions) -> None:
    """Write the settings of a new study; raise InputError if those of an earlier one differ."""
    photographs = [(path.name, path.stat().st_size) for path in photograph_files(options.photographs)]
    settings = json.dumps({
        "format": FORMAT,
        "preset": {"name": options.preset, **asdict(options.settings)},
        "photographs": hashlib.blake2b(json.dumps(photographs).encode(), digest_size=16).hexdigest(),
    })  # fmt: skip
    file = options.output / "study.json"
    try:
        if not file.exists():
            file.write_text(settings)
        before = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{options.output} cannot be used for a study: {error}") from None
    if before != json.loads(settings):
        raise InputError(
            f"the study in {options.output} has another preset, other photographs or files of another version; "
            "choose another folder"
        )


def _run_units(options: StudyOptions, progress: bool) -> None:
    """Run the units that are not done, starts first, several at a time. A unit that fails ends the study."""
    context = multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    photographs, systems = list(options.photographs), options.system_names
    total = len(options.seed_numbers) * (1 + len(systems))
    with Progress(total, "units", progress) as shown, _pool(options.jobs, context, messages) as pool:
        running: dict[Future, Unit] = {}

        def submit(unit: Unit) -> None:
            running[pool.submit(_run_unit, unit, options.settings, photographs)] = unit

        for seed in options.seed_numbers:
            submit(Unit(options.output, seed, _START))
        while running:
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            while not messages.empty():
                shown.say(messages.get())
            for future in done:
                unit = running.pop(future)
                future.result()
                shown.advance(1)
                for system in systems if unit.name == _START else ():
                    submit(Unit(unit.output, unit.seed, system))


@contextmanager
def _pool(jobs: int | None, context: Any, messages: Any) -> Iterator[ProcessPoolExecutor]:
    """Open a pool whose processes end at once on an error or Ctrl-C here: a rerun resumes their work."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs or len(os.sched_getaffinity(0)), context, _start_process, (messages,))
    try:
        yield pool
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise InputError(
                "a process of the study was killed, perhaps for lack of memory; rerun the same command to resume"
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_messages: Any = None  # in a process of the pool: the queue of its messages


def _start_process(messages: Any) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study ends its processes itself
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console.quiet = True  # messages go through the queue


def _exit_with_parent() -> None:
    """Exit when the study is killed: by then another study may have locked the folder."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_unit(unit: Unit, preset: Preset, photographs: Sequence[Path]) -> None:
    """Run a unit, in a process of the pool, unless it is done."""
    if unit.is_done:
        return

    def tell(text: str) -> None:
        _messages.put(f"{unit.folder.name} {unit.name}: {text}")

    unit.folder.mkdir(exist_ok=True)
    if unit.name == _START:
        make_start(unit.folder, unit.seed, preset, photographs, tell)
    else:
        run_system(unit.folder, unit.seed, unit.name, preset, tell)
