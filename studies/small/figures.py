"""The study's figures, after the paper's figure 4 and the supplement's figure 2, in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from flexattn_cuda.errors import InputError
from studies.small.statistics import Accuracy

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = "osD^v*"
_INK = "#333333"


def require_matplotlib() -> None:
    """Raise InputError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError("the study's figures need matplotlib; run pip install matplotlib")


_LOOK = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 10,
    "text.color": _INK,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}


@contextmanager
def _figure(path: Path, columns: int, figsize: tuple[float, float], **options):
    """Draw a figure of panels side by side inside the block, and save it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_LOOK):
        figure = Figure(layout="constrained", figsize=figsize)
        (panels,) = figure.subplots(1, columns, squeeze=False, **options)
        yield figure, panels
        figure.savefig(path, dpi=150)


def draw_strategies(
    path: Path,
    groups: Sequence[str],
    strategies: Mapping[str, Sequence[Accuracy | None]],
    base: Sequence[Accuracy | None],
    chance: Sequence[float],
) -> None:
    """Draw figure 4, left: bars of each strategy by task, with the standard deviation over the seeds.

    Args:
        path: Of the image.
        groups: Names of the tasks, in the order of all lists.
        strategies: By name, the accuracy of each task.
        base: Accuracy of the low-resolution model, drawn as lines across the bars.
        chance: Accuracy of a guess, drawn likewise; NaN where unknown.
    """
    with _figure(path, 1, (8.4, 3.8)) as (figure, (axes,)):
        at, width = np.arange(len(groups)), 0.8 / max(1, len(strategies))
        for number, (name, found) in enumerate(strategies.items()):
            axes.bar(
                at + (number - (len(strategies) - 1) / 2) * width,
                _percent(found),
                width * 0.92,
                yerr=np.nan_to_num(_deviations(found)),
                color=COLORS[number],
                ecolor=_INK,
                error_kw={"elinewidth": 1},
                label=name,
            )
        low, guess = _percent(base), 100 * np.array(chance)
        for values, style, color, label in (
            (low, "-", _INK, "low resolution (LLaVA)"),
            (guess, ":", "#777777", "chance"),
        ):
            if np.isfinite(values).any():
                axes.hlines(values, at - 0.45, at + 0.45, color=color, linestyle=style, linewidth=1.6, label=label)
        axes.set_xticks(at, groups)
        axes.tick_params(axis="x", length=0)
        axes.set(ylabel="accuracy on small objects, %", ylim=(0, 100))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)


def draw_resolutions(
    path: Path,
    zooms: Sequence[int],
    accuracies: Mapping[str, Sequence[Accuracy | None]],
    costs: Mapping[str, Sequence[float]],
) -> None:
    """Draw figure 4, right: accuracy by task, and cost, against zoom.

    Args:
        path: Of the image.
        zooms: In the order of all lists.
        accuracies: By task, "all" drawn bold.
        costs: By name, in GFLOPs.
    """
    with _figure(path, 2, (9.4, 4.4), width_ratios=(3, 2)) as (figure, (left, right)):
        for number, (name, found) in enumerate(accuracies.items()):
            _draw_accuracy(left, zooms, name, found, number, len(accuracies))
        for number, (name, values) in enumerate(costs.items()):
            style = {"marker": MARKERS[number], "color": COLORS[number], "linestyle": ("-", "--")[number % 2]}
            right.plot(zooms, values, label=name, **style)
        left.set(title="Accuracy on small objects, %", ylim=(0, 100))
        right.set(title="Cost of a prompt, GFLOPs")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xticks(zooms, [f"{zoom}×" if zoom > 1 else "1×\n(LLaVA)" for zoom in zooms])
        figure.supxlabel("side of the image relative to the low-resolution image", fontsize=10)
        right.legend(fontsize=9)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(accuracies), fontsize=9)


def _draw_accuracy(axes, zooms: Sequence[int], name: str, found: Sequence[Accuracy | None], number: int, count: int):
    """Draw a task's line with error bars, moved sideways a little so that no bar covers another."""
    style = {"color": COLORS[number % len(COLORS)], "linewidth": 1.3}
    if name == "all":
        style = {"color": _INK, "linewidth": 2.6}
    axes.errorbar(
        np.array(zooms) + 0.035 * (number - (count - 1) / 2),
        _percent(found),
        _deviations(found),
        label=name,
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        capsize=2,
        **style,
    )


def draw_maps(
    path: Path, layers: Sequence[int], maps: Mapping[str, Mapping[str, np.ndarray]], flat: Mapping[str, float]
) -> None:
    """Draw the supplement's figure 2: share of the attention map's mass in the answer boxes by layer.

    Args:
        path: Of the image.
        layers: Their numbers, from 0.
        maps: By size and system, [seeds, layers].
        flat: By size, the share of a flat map.
    """
    with _figure(path, len(maps), (8.4, 3.6), sharey=True) as (figure, panels):
        for axes, (size, by_system) in zip(panels, maps.items()):
            for number, (name, values) in enumerate(by_system.items()):
                style = {"color": COLORS[number], "linestyle": ("-", "--")[number % 2]}
                axes.plot(layers, 100 * values.T, linewidth=0.8, alpha=0.45, **style)
                axes.plot(layers, 100 * values.mean(0), linewidth=2.4, marker=MARKERS[number], label=name, **style)
            axes.axhline(100 * flat[size], color="#777777", linestyle=":", label="flat map")
            axes.set(title=f"{size} objects", xlabel="layer", xticks=layers)
        panels[0].set(ylabel="mass of the map in the answer boxes, %", ylim=(0, None))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)


def _percent(found: Sequence[Accuracy | None]) -> np.ndarray:
    return 100 * np.array([one.accuracy if one else np.nan for one in found])


def _deviations(found: Sequence[Accuracy | None]) -> np.ndarray:
    return 100 * np.array([one.deviation if one else np.nan for one in found])
