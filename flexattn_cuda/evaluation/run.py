"""`flexattn eval`: the paper's tables by lmms-eval, one system after the other.

    tasks ─ loaded once ─► for each system and task: lmms-eval asks `FlexAttn`, which answers in the batches of `plan`
          ─► journals/SYSTEM/TASK.partial.RANK  what is answered, kept so that a run can be resumed, or extended
          ─► results.csv, costs.csv, table_N.csv, samples/SYSTEM/TASK.jsonl, pictures, report.html

All processes ask the same questions, and share their batches; to lmms-eval each of them is alone.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import eval_logger, simple_evaluate
from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_eval.utils import load_yaml_config

from flexattn_cuda.checkpoints import adapters
from flexattn_cuda.checkpoints.files import content_hash, first_line
from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation.data import DATA_VARIABLE
from flexattn_cuda.evaluation.judged import loadable, missing_key, no_marks, unscored
from flexattn_cuda.evaluation.model import FlexAttn
from flexattn_cuda.evaluation.pictures import draw
from flexattn_cuda.evaluation.plan import KIND, JournalledRunner
from flexattn_cuda.evaluation.published import MAP_TASK, PAPER_TASKS
from flexattn_cuda.evaluation.report import write_report
from flexattn_cuda.evaluation.results import Cost, Metric, TaskResult, write_results
from flexattn_cuda.runs.files import locked_folder
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.journal import discard_journal
from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.tasks.load import checkpoint_folder
from flexattn_cuda.tasks.options import OWN_SYSTEM, EvalOptions

_TASKS = Path(__file__).parent / "tasks"
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # variables by which lmms-eval knows of other processes


def evaluate(options: EvalOptions, progress: bool = False) -> list[TaskResult]:
    """Evaluate systems on tasks, and write the results; call it again to resume after an interruption.

    In a process that torchrun or `accelerate launch` started, this process answers its share, on the GPU of its local
    rank; all machines must see the folder of the output.

    Args:
        options: What to evaluate, and how.
        progress: Print progress on stderr.

    Returns:
        The result of each system and task, in every process.

    Raises:
        CheckpointError: If the model cannot be loaded.
        InputError: If a task or its data cannot be used, an earlier run had other options, or an option cannot be used.
    """
    eval_logger.disable("lmms_eval")
    options = _with_absolute_paths(options)
    with Processes() as processes, ExitStack() as stack:
        processes.broadcast_from_rank0(lambda: _start(options, stack))
        device = str(processes.device(options.device))
        stack.enter_context(_alone())
        stack.enter_context(_data_at(options.data))
        loaded: list[dict[str, Any]] = []
        processes.broadcast_from_rank0(lambda: loaded.append(_load_tasks(options)))  # others read what it has cached
        tasks = loaded[0] if loaded else _load_tasks(options)
        _leave_unscored(tasks, progress and processes.rank == 0)
        results: list[TaskResult] = []
        for system in options.system_names:
            model = _Kept(
                options.model,
                options.batch_size,
                device,
                system=None if system == OWN_SYSTEM else system,
                adapter=options.adapter,
                quantize=options.quantize,
                dtype=options.dtype,
                max_new_tokens=options.max_new_tokens,
            )
            for name, task in tasks.items():
                if name != MAP_TASK or model.has_maps:
                    results.append(_evaluate(options, processes, system, model, {name: task}, progress))
            del model
            gc.collect()
        processes.broadcast_from_rank0(lambda: _write(options, results))
        return results


class _Kept(FlexAttn):
    """A model that lmms-eval does not throw away after a task: others follow."""

    def clean(self) -> None:
        """Do nothing."""


def _with_absolute_paths(options: EvalOptions) -> EvalOptions:
    """Return options that mean the same in any folder: tasks of lmms-eval look for data in the current one."""
    model, adapter = str(checkpoint_folder(options.model).absolute()), options.adapter
    found = None if adapter is None else str(adapters.find(adapter).absolute())
    data = None if options.data is None else options.data.absolute()
    return replace(options, model=model, adapter=found, output=options.output.absolute(), data=data)


def _start(options: EvalOptions, stack: ExitStack) -> None:
    """Lock the folder of the output, and discard earlier answers if that is wanted."""
    stack.enter_context(locked_folder(options.output))
    if options.restart:
        for folder in {path.parent for path in (options.output / "journals").glob("*/*")}:
            for path in sorted(folder.iterdir()):
                discard_journal(path, KIND)


@contextmanager
def _alone() -> Iterator[None]:
    """Hide the launcher from lmms-eval, which would share the questions in its own way."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _data_at(folder: Path | None) -> Iterator[None]:
    """Let all tasks look for their data in a folder."""
    if folder is None:
        yield
        return
    before, variable = Path.cwd(), os.environ.get(DATA_VARIABLE)
    os.chdir(folder)
    os.environ[DATA_VARIABLE] = str(folder)
    try:
        yield
    finally:
        os.chdir(before)
        if variable is None:
            del os.environ[DATA_VARIABLE]
        else:
            os.environ[DATA_VARIABLE] = variable


def _load_tasks(options: EvalOptions) -> dict[str, Any]:
    """Return the tasks by name, with their data.

    Raises:
        InputError: If there is no such task, or its data is missing or has another format.
    """
    manager = TaskManager(include_path=str(_TASKS))
    names = [one for name in options.task_names for one in (PAPER_TASKS if name == "paper" else (name,))]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        if name not in manager.all_tasks or name in (*manager.all_groups, *manager.all_tags):
            raise InputError(f"there is no single task {name!r}; `lmms-eval tasks list` prints those of lmms-eval")
        with loadable(name):
            found |= _load_task(options, manager, name)
    return found


def _load_task(options: EvalOptions, manager: TaskManager, name: str) -> dict[str, Any]:
    path = load_yaml_config(manager.task_index[name]["yaml_path"], mode="full").get("dataset_path")
    if options.data is not None and path is not None and not Path(path).is_dir():
        raise InputError(
            f"the task {name} reads {path}, and there is no folder {options.data / path}; copy that data set there"
        )
    try:
        loaded: dict[str, Any] = get_task_dict([name], manager)
        return loaded
    except InputError:
        raise
    except Exception as error:  # of any library that reads data
        cause = _cause(error)
        raise InputError(
            f"the data of the task {name} cannot be read ({type(cause).__name__}: {first_line(cause)}); it must be "
            f"{path} as on the hub, or a copy of it in the folder that --data names"
        ) from error


def _leave_unscored(tasks: Mapping[str, Any], say: bool) -> None:
    """Let the tasks score nothing whose judge lacks its key: it would call the network, and mark all as wrong."""
    for name, task in tasks.items():
        if (variable := missing_key(name)) is not None:
            task.config.process_results = no_marks
            if say:
                print(unscored(name, variable), file=sys.stderr, flush=True)


def _cause(error: Exception) -> BaseException:
    """Return an error, or what went wrong at the last of several attempts, which lmms-eval makes."""
    attempt = getattr(error, "last_attempt", None)
    return error if attempt is None else attempt.exception()


def _evaluate(
    options: EvalOptions, processes: Processes, system: str, model: FlexAttn, task: Mapping[str, Any], progress: bool
) -> TaskResult:
    """Evaluate one system on one task."""
    [(name, loaded)] = task.items()
    journal = options.output / "journals" / system / name
    journal.parent.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(options, system)
    model.runner = JournalledRunner(processes, journal, fingerprint, f"{system}, {name}", progress)
    try:
        found = simple_evaluate(
            model, tasks=[loaded], limit=options.limit, bootstrap_iters=0, distributed_executor_backend="torchrun"
        )
    except Exception as error:
        cause = _cause(error)
        if not isinstance(cause, (KeyError, AssertionError)):
            raise
        raise InputError(
            f"the data of the task {name} has another format than its code reads ({type(cause).__name__}: "
            f"{first_line(cause)}); compare its fields with those of the data set on the hub"
        ) from error
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    metrics = {
        key.partition(",")[0]: Metric.of(value, samples, key.partition(",")[0])
        for key, value in sorted(found["results"][name].items())
        if "," in key and "_stderr" not in key and isinstance(value, (int, float))
    }
    pictures = draw(options, system, model, loaded, samples) if processes.rank == 0 else []
    cost = Cost.of(system, name, model.model, model.runner.outcomes)
    return TaskResult(system, name, metrics, samples, cost, pictures)


def _fingerprint(options: EvalOptions, system: str) -> Fingerprint:
    assert options.model is not None
    return options.fingerprint().with_facts(
        system=system,
        model=content_hash(Path(options.model)),
        adapter=None if options.adapter is None else content_hash(Path(options.adapter)),
    )


def _write(options: EvalOptions, results: list[TaskResult]) -> None:
    write_results(options.output, results, options.system_names)
    write_report(options, results)
