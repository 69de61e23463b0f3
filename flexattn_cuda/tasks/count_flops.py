"""The cost of a prompt in the paper's systems, beside the paper's own figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexattn_cuda.analysis import flops
from flexattn_cuda.analysis.plots import check_plot
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.llava.config import FlexAttnLlavaConfig
from flexattn_cuda.runs.files import check_writable, os_errors_as_input_errors
from flexattn_cuda.runs.options import STREAM
from flexattn_cuda.tasks.load import read_checkpoint_info
from flexattn_cuda.tasks.options import FlopsOptions, names_in

_ZOOMS = range(1, 5)  # of the plot


@dataclass(frozen=True)
class PreparedFlops:
    """What to count.

    Attributes:
        options: The options.
        base: The model's configuration, before it becomes one of the systems.
        configs: The configuration of each system.
        paper: TFLOPs of the paper's table 5 by system, if it is that case.
    """

    options: FlopsOptions
    base: FlexAttnLlavaConfig
    configs: dict[str, FlexAttnLlavaConfig]
    paper: dict[str, float]


@dataclass(frozen=True)
class ImpliedSelection:
    """The number of selected tokens at which FlexAttention costs what the paper says.

    Attributes:
        tflops: The paper's figure.
        selected: The number of selected HR tokens.
        tokens: The number of all HR tokens.
    """

    tflops: float
    selected: int
    tokens: int


@dataclass(frozen=True)
class FlopsReport:
    """Costs by system.

    Attributes:
        model: The checkpoint or the size of LLaVA-1.5.
        text_tokens: Number of prompt tokens besides the image's.
        costs: The cost of each system.
        paper: The paper's TFLOPs by system, if it has the same case.
        implied: What the paper's figure for FlexAttention implies, if it has one.
    """

    model: str
    text_tokens: int
    costs: dict[str, flops.Cost]
    paper: dict[str, float]
    implied: ImpliedSelection | None


def prepare_flops(options: FlopsOptions) -> PreparedFlops:
    """Make the configurations of all systems; raise InputError or CheckpointError if anything cannot be used."""
    if options.plot is not None:
        check_plot(options.plot)
    if options.json_file not in (None, STREAM):
        check_writable(options.json_file)
    shape = options.shape or "7b"
    base = base_config(options.model, shape)
    configs = configs_of(options.model, shape, options.systems, options.zoom)
    _refuse_unused_selection(options, configs)
    is_the_papers = options.model is None and shape == "7b" and options.zoom in (None, 3)
    return PreparedFlops(options, base, configs, flops.PAPER.get(options.text_tokens, {}) if is_the_papers else {})


def base_config(model: str | None, shape: str | None) -> FlexAttnLlavaConfig:
    """Return the configuration of a checkpoint, or of a size of LLaVA-1.5, by default 7B.

    Raises:
        CheckpointError: If there is no such checkpoint, or its configuration cannot be used.
        InputError: If there is no such size.
    """
    return flops.llava_shape(shape or "7b") if model is None else read_checkpoint_info(model).config


def configs_of(
    model: str | None, shape: str | None, systems: str | None, zoom: int | None = None
) -> dict[str, FlexAttnLlavaConfig]:
    """Return the configurations of systems, separated by commas, by default those of table 5.

    Raises:
        CheckpointError: As `base_config` does.
        InputError: If there is no such size or system, or it does not fit the model.
    """
    base, names = base_config(model, shape), flops.COMPARED if systems is None else names_in(systems)
    return {name: flops.as_system(base, name, zoom) for name in names}


def _refuse_unused_selection(options: FlopsOptions, configs: dict[str, FlexAttnLlavaConfig]) -> None:
    given = [name for name in ("selected", "tiles") if getattr(options, name) is not None]
    if given and not any(config.system == "flexattn" for config in configs.values()):
        raise InputError(
            f"--{given[0]} applies to FlexAttention only, and the systems are {', '.join(configs)}; leave it out, "
            "or add flexattn to --systems"
        )


def count_flops(prepared: PreparedFlops) -> FlopsReport:
    """Count what a prompt with one image costs in each system."""
    options = prepared.options
    costs = {
        system: flops.cost(config, options.text_tokens, options.selected, options.tiles)
        for system, config in prepared.configs.items()
    }
    model = options.model or options.shape or "7b"
    return FlopsReport(model, options.text_tokens, costs, prepared.paper, _implied(prepared))


def _implied(prepared: PreparedFlops) -> ImpliedSelection | None:
    config, tflops = prepared.configs.get("flexattn"), prepared.paper.get("flexattn")
    if config is None or tflops is None:
        return None
    selected = flops.selected_for(config, tflops, prepared.options.text_tokens)
    return ImpliedSelection(tflops, selected, config.hr_side**2)


def to_json(report: FlopsReport) -> str:
    """Return a report as JSON."""
    content: dict[str, Any] = {
        "model": report.model,
        "text_tokens": report.text_tokens,
        "systems": {
            system: {
                "published_tflops": cost.published_tflops,
                "here_tflops": cost.here_tflops,
                "parts": {part: count / 1e12 for part, count in cost.published.items()},
                "here_parts": {part: count / 1e12 for part, count in cost.here.items()},
            }
            for system, cost in report.costs.items()
        },
    }
    if report.implied is not None:
        content["implied"] = {"published_tflops": report.implied.tflops, "selected": report.implied.selected}
    return json.dumps(content, indent=2) + "\n"


def write_json(report: FlopsReport, path: Path) -> None:
    """Write a report as JSON; raise InputError if the file cannot be written."""
    with os_errors_as_input_errors(path):
        path.write_text(to_json(report))


def plot_flops(prepared: PreparedFlops, path: Path) -> None:
    """Plot the cost of each system against the resolution, with the same share of selected tokens and tiles."""
    options = prepared.options
    # The other systems select nothing.
    flexattn = next((config for config in prepared.configs.values() if config.system == "flexattn"), None)
    share, tile_share = flops.SHARE, 1.0
    if flexattn is not None and options.selected is not None:
        share = options.selected / flexattn.hr_side**2
    if flexattn is not None and options.tiles is not None:
        tile_share = options.tiles / flexattn.flexattn.zoom**2
    systems = list(prepared.configs)
    points = flops.by_resolution(prepared.base, systems, _ZOOMS, options.text_tokens, share, tile_share)
    flops.plot(points, path)
