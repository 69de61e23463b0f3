"""What a prompt and a token cost on this machine: latency, throughput and memory, by system and resolution.

Each row is measured in a process of its own, so that its peak of memory is its own, and a row that does not fit into
the memory leaves the others. A row answers once to warm up, then several times; before and after each call the queue of
the GPU is empty. The vision tower belongs to the prompt. Pixels and words are random; what the maps select is replaced
by a given number of tokens (`analysis.forced`), the same at every step, so that rows, models and machines compare.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from flexattn_cuda import checkpoints
from flexattn_cuda.analysis import flops, memory
from flexattn_cuda.analysis.forced import ForcedSelection, forced, in_tiles, selected
from flexattn_cuda.analysis.measuring import Machine, Meter, machine
from flexattn_cuda.analysis.plots import check_plot
from flexattn_cuda.checkpoints.locate import weight_files
from flexattn_cuda.devices import choose_device, choose_dtype
from flexattn_cuda.errors import CheckpointError, InputError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.mechanism.cache import HRCache
from flexattn_cuda.mechanism.cache_argument import CACHE_ARGUMENT
from flexattn_cuda.runs.files import check_writable, os_errors_as_input_errors, write_csv
from flexattn_cuda.tasks.load import DEFAULT_MODEL, read_checkpoint_info
from flexattn_cuda.tasks.options import BenchOptions

_NO_MEMORY = "does not fit into the memory"


@dataclass(frozen=True)
class Case:
    """What a row measures.

    Attributes:
        system: The system.
        config: Of the model, as that system.
        weights: Folder of the checkpoint; None for random weights.
        device: "cpu" or "cuda:N".
        dtype: Of the weights and pixels.
        options: The options.
        selected: HR tokens to select in each layer; None if the system selects its own, or none.
        tiles: Tiles that they lie in.
    """

    system: str
    config: FlexAttnLlavaConfig
    weights: Path | None
    device: str
    dtype: torch.dtype
    options: BenchOptions
    selected: int | None
    tiles: int | None


@dataclass(frozen=True)
class Row:
    """What was measured of a system at a resolution. The fields are columns of the table.

    Attributes:
        system: The system.
        side: Of the image in pixels.
        positions: Length of the prompt in tokens, the image's included.
        selected: HR tokens that a layer attends to beside them.
        tiles: Tiles that were encoded.
        prompt_s: Seconds from pixels and token ids to the logits of the first token, for the whole batch.
        token_s: Seconds for a further token of the whole batch.
        answers_per_s: Answers of 1 + `--new-tokens` tokens per second.
        tokens_per_s: Tokens per second after the prompt.
        peak_mib: Peak of memory with the weights, in MiB: torch's on a GPU, the process's on the CPU.
        prompt_tflops: TFLOPs of one prompt, as `flexattn flops` counts them.
        tflop_per_s: TFLOPs per second that the prompts reach.
        failure: Why nothing was measured; None if it was.
    """

    system: str
    side: int
    positions: int
    selected: int | None = None
    tiles: int | None = None
    prompt_s: float | None = None
    token_s: float | None = None
    answers_per_s: float | None = None
    tokens_per_s: float | None = None
    peak_mib: float | None = None
    prompt_tflops: float | None = None
    tflop_per_s: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class PreparedBench:
    """What is measured, and where.

    Attributes:
        options: The options.
        model: Name of the model.
        random: Whether its weights are random.
        machine: This machine.
        cases: The rows.
    """

    options: BenchOptions
    model: str
    random: bool
    machine: Machine
    cases: list[Case]


def prepare_bench(options: BenchOptions) -> PreparedBench:
    """Choose the model, the device and the rows.

    Raises:
        CheckpointError: If there is no such checkpoint, or its configuration cannot be used.
        InputError: If an option cannot be used here.
    """
    if options.plot is not None:
        check_plot(options.plot)
    if options.csv is not None:
        check_writable(options.csv)
    device, dtype = choose_device(options.device), choose_dtype(options.dtype)
    _make_current(device)
    base, weights, name = _model(options)
    if dtype is None:
        half = options.shape is not None and device.type == "cuda"
        dtype = torch.float16 if half else getattr(base, "dtype", None) or torch.float32
    cases = []
    for system in options.system_names:
        one_resolution = system in ("llava", "hd")
        for zoom in (None,) if one_resolution or options.zoom_numbers is None else options.zoom_numbers:
            config = flops.as_system(base, system, zoom)
            selection = _selection(config, options)
            cases.append(Case(system, config, weights, str(device), dtype, options, *selection))
            _check_length(config, options)
    return PreparedBench(options, name, weights is None, machine(device.type), cases)


def _make_current(device: torch.device) -> None:
    """Make a GPU the one that torch's facts and the meter are about."""
    if device.index is not None:
        torch.cuda.set_device(device)


def _model(options: BenchOptions) -> tuple[FlexAttnLlavaConfig, Path | None, str]:
    """Return the model's configuration, the folder of its weights or None, and its name."""
    if options.shape is not None:
        return flops.llava_shape(options.shape), None, f"LLaVA-1.5-{options.shape}"
    name = str(DEFAULT_MODEL if options.model is None else options.model)
    found = read_checkpoint_info(name)
    local = Path(name).is_dir()
    folder = found.folder if local else checkpoints.resolve_folder(name)
    return found.config, folder if not local or _has_weights(folder) else None, options.model or "the small model"


def _has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights; a damaged or incomplete set of them is for loading to refuse."""
    if any(folder.glob("*.index.json")):
        return True
    try:
        return bool(weight_files(folder))
    except CheckpointError:
        return False


def _selection(config: FlexAttnLlavaConfig, options: BenchOptions) -> tuple[int | None, int | None]:
    """Return the HR tokens to select, and their tiles; None where the system does not select by its maps."""
    if config.system != "flexattn" or config.flexattn.strategy != "attention":
        return None, None
    count = options.selected
    if count is None:
        tiles = config.flexattn.zoom**2 if options.tiles is None else options.tiles
        count = min(memory.expected_tokens(config), tiles * config.hr_side**2 // config.flexattn.zoom**2)
    return flops.checked_selection(config, options.text_tokens, count, options.tiles)


def _check_length(config: FlexAttnLlavaConfig, options: BenchOptions) -> None:
    length, limit = config.image_tokens + options.text_tokens, config.text_config.max_position_embeddings
    if length + options.new_tokens > limit:
        raise InputError(
            f"a prompt of {length} tokens and {options.new_tokens} new ones are too long for the model, which has "
            f"{limit} positions; choose fewer with --text-tokens or --new-tokens"
        )


def bench(prepared: PreparedBench, prepare_process: Callable[[], None] | None = None) -> Iterator[Row]:
    """Measure the rows one after the other, each in a new process.

    Args:
        prepared: What to measure.
        prepare_process: Called in each process at first; a function of a module.
    """
    for case in prepared.cases:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, prepare_process) as pool:
            try:
                row = pool.submit(measure, case).result()
            except BrokenProcessPool:  # the system ends a process that takes all of its memory
                row = dataclasses.replace(_empty(case), failure=_NO_MEMORY)
        yield row if row.failure else _with_flops(row, case)


def _empty(case: Case) -> Row:
    settings, text = case.config.flexattn, case.options.text_tokens
    side = case.config.vision_config.image_size if settings is None else settings.highres_size
    return Row(case.system, side, case.config.image_tokens + text)


def _with_flops(row: Row, case: Case) -> Row:
    assert row.prompt_s is not None
    counted = flops.count(case.config, case.options.text_tokens, row.selected, row.tiles)
    tflops = sum(counted.values()) / 1e12
    return dataclasses.replace(row, prompt_tflops=tflops, tflop_per_s=case.options.batch_size * tflops / row.prompt_s)


# -------------------------------------------------------------------------------------------------------- measurements


@torch.inference_mode()
def measure(case: Case) -> Row:
    """Measure a row in this process.

    Raises:
        CheckpointError: If the weights cannot be loaded.
        InputError: If the model's logits are NaN or infinite.
    """
    options = case.options
    _make_current(torch.device(case.device))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        answering = _Answering(case, _load(case))
        answering.answer(min(2, options.new_tokens))
        answers = [answering.answer(options.new_tokens) for _ in range(options.repetitions)]
    except (torch.OutOfMemoryError, MemoryError):
        return dataclasses.replace(_empty(case), failure=_NO_MEMORY)
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        return dataclasses.replace(_empty(case), failure=_NO_MEMORY)
    prompt = statistics.median(one.prompt for one in answers)
    token = statistics.median(seconds for one in answers for seconds in one.tokens)
    return dataclasses.replace(
        _empty(case),
        selected=answers[0].selected,
        tiles=answers[0].tiles,
        prompt_s=prompt,
        token_s=token,
        answers_per_s=options.batch_size / (prompt + options.new_tokens * token),
        tokens_per_s=options.batch_size / token,
        peak_mib=max(one.peak_bytes for one in answers) / 2**20,
    )


def _load(case: Case) -> FlexAttnLlavaForConditionalGeneration:
    device = torch.device(case.device)
    if case.weights is None:
        return random_model(case.config, device, case.dtype)
    loaded = FlexAttnLlavaForConditionalGeneration.from_pretrained(
        str(case.weights), config=case.config, dtype=case.dtype
    )
    return loaded.eval().to(device)


def random_model(
    config: FlexAttnLlavaConfig, device: torch.device, dtype: torch.dtype
) -> FlexAttnLlavaForConditionalGeneration:
    """Return a model with random weights, always the same, made on the device."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return FlexAttnLlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True)
class _Answered:
    """Seconds of a prompt and of each token after it, the peak of memory, and what was selected in a layer."""

    prompt: float
    tokens: list[float]
    peak_bytes: int
    selected: int | None
    tiles: int | None


class _Answering:
    """Answers the prompt of a case."""

    def __init__(self, case: Case, model: FlexAttnLlavaForConditionalGeneration):
        self._case, self._model, self._meter = case, model, Meter(case.device)
        inputs = flops.prompt(case.config, case.options.text_tokens, "cpu")
        generator, batch = torch.Generator().manual_seed(2), case.options.batch_size
        self._inputs: dict[str, Any] = {}
        for name, value in inputs.items():
            value = value.expand(batch, *value.shape[1:])
            if value.is_floating_point():
                value = torch.randn(value.shape, generator=generator).to(case.dtype)
            self._inputs[name] = value.to(case.device)
        self._forced = None
        if case.selected is not None:
            side, zoom = case.config.hr_side, case.config.flexattn.zoom
            tokens = in_tiles(case.selected, case.tiles or zoom**2, side, zoom)
            chosen = selected(tokens, side**2, case.device, batch)
            self._forced = ForcedSelection([chosen], len(case.config.hr_layers))

    def answer(self, new_tokens: int) -> _Answered:
        """Answer once."""
        cache = DynamicCache(config=self._model.config.text_config)
        common = {CACHE_ARGUMENT: cache, "use_cache": True, "logits_to_keep": 1}
        given, readings, tokens, tiles = self._inputs, [], None, None
        for step in range(1 + new_tokens):
            with forced(self._forced):
                reading = self._meter(lambda given=given: self._model(**given, **common).logits)
            if not bool(reading.logits.isfinite().all()):
                raise InputError(
                    f"the model's logits are NaN or infinite in {reading.logits.dtype}; choose another --dtype"
                )
            given = {"input_ids": reading.logits[:, -1:].argmax(-1)}
            readings.append(reading)
            if step == 0:
                tokens, tiles = self._selected(cache)
        seconds = [one.seconds for one in readings]
        return _Answered(seconds[0], seconds[1:], max(one.peak_bytes for one in readings), tokens, tiles)

    def _selected(self, cache: DynamicCache) -> tuple[int | None, int | None]:
        """Return the HR tokens of a layer and the tiles of a prompt, after the prompt."""
        images = HRCache.beside(cache)
        if images is None or self._case.config.system != "flexattn":
            return None, None
        batch, layers = self._case.options.batch_size, len(self._case.config.hr_layers)
        return round(images.counters.projected / (batch * layers)), math.ceil(images.counters.encoded / batch)


# ------------------------------------------------------------------------------------------------------------- results


def write_bench(prepared: PreparedBench, rows: Sequence[Row], path: Path) -> None:
    """Write the rows with what they were measured on; raise InputError if the file cannot be written."""
    options = prepared.options
    where = prepared.machine.columns() | {
        "model": prepared.model,
        "weights": "random" if prepared.random else "checkpoint",
        "dtype": str(prepared.cases[0].dtype).removeprefix("torch."),
        "threads": options.threads or torch.get_num_threads(),
        "batch_size": options.batch_size,
        "new_tokens": options.new_tokens,
        "repetitions": options.repetitions,
    }
    header = [*where, *(field.name for field in dataclasses.fields(Row))]
    with os_errors_as_input_errors(path):
        write_csv(path, header, [[*where.values(), *dataclasses.astuple(row)] for row in rows])


_PANELS = {"prompt_s": "seconds of a prompt", "token_s": "seconds of a token", "peak_mib": "peak memory in MiB"}


def plot_bench(prepared: PreparedBench, rows: Sequence[Row], path: Path) -> None:
    """Plot latencies and memory against the image's side; raise InputError if the file cannot be written."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items()):
        for number, system in enumerate(prepared.options.system_names):
            found = [(row.side, getattr(row, column)) for row in rows if row.system == system and not row.failure]
            if found:
                axes.plot(*zip(*sorted(found)), f"C{number}o-", label=system)
        axes.set(xlabel="side of the image in pixels", ylabel=label, ylim=(0, None))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.suptitle(f"{prepared.model}, {prepared.machine.device}", fontsize="medium")
    with os_errors_as_input_errors(path):
        figure.savefig(path, dpi=150)
