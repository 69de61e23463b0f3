"""The study's figures, after the paper's figure 4 and the supplement's figure 2. Accuracies and shares are drawn in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from flexattn_cuda.errors import InputError
from studies.small.statistics import Accuracy

COLORS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
)  # Okabe and Ito: told apart by colour-blind readers
MARKERS = "osD^v*"
_INK = "#333333"


def require_matplotlib() -> None:
    """InputError where it is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError("the study's figures need matplotlib: pip install matplotlib")


@contextmanager
def _figure(path: Path, *shape: int, **options):
    import matplotlib
    from matplotlib.figure import Figure

    look = {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _INK, "axes.titlesize": 11,
            "axes.titlelocation": "left", "font.size": 10, "text.color": _INK, "legend.frameon": False, "axes.grid": True,
            "axes.grid.axis": "y", "grid.color": "#e4e4e4", "axes.axisbelow": True}  # fmt: skip
    with matplotlib.rc_context(look):
        figure = Figure(layout="constrained", figsize=options.pop("figsize"))
        yield figure, figure.subplots(*shape, squeeze=False, **options)
        figure.savefig(path, dpi=150)


def draw_strategies(
    path: Path,
    groups: Sequence[str],
    strategies: Mapping[str, Sequence[Accuracy | None]],
    base: Sequence[Accuracy | None],
    chance: Sequence[float],
) -> None:
    """Figure 4, left: bars of each strategy by task, with the standard deviation over seeds.

    Args:
        groups: Names of the tasks; all lists go by them.
        base: The low-resolution model's, drawn as a line across the bars.
        chance: Shares of right answers of a guess; nan where unknown.
    """
    with _figure(path, 1, 1, figsize=(8.4, 3.8)) as (figure, ((axes,),)):
        at, width = np.arange(len(groups)), 0.8 / max(1, len(strategies))
        for number, (name, found) in enumerate(strategies.items()):
            x = at + (number - (len(strategies) - 1) / 2) * width
            errors = 100 * np.array([one.deviation if one else np.nan for one in found])
            axes.bar(x, _percent(found), width * 0.92, yerr=np.nan_to_num(errors), color=COLORS[number], ecolor=_INK, label=name,
                     error_kw={"elinewidth": 1})  # fmt: skip
        lines = (
            (_percent(base), "-", _INK, "low resolution (LLaVA)"),
            (100 * np.array(chance), ":", "#777777", "chance"),
        )
        for values, style, color, label in lines:
            if np.isfinite(values).any():
                axes.hlines(
                    values,
                    at - 0.45,
                    at + 0.45,
                    color=color,
                    linestyle=style,
                    linewidth=1.6,
                    label=label,
                )
        axes.set_xticks(at, groups)
        axes.tick_params(axis="x", length=0)
        axes.set(ylabel="right answers on small objects, %", ylim=(0, 100))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)


def draw_resolutions(
    path: Path,
    zooms: Sequence[int],
    accuracies: Mapping[str, Sequence[Accuracy | None]],
    costs: Mapping[str, Sequence[float]],
) -> None:
    """Figure 4, right: accuracy by task, and cost in GFLOPs, against zoom; all lists go by `zooms`."""
    with _figure(path, 1, 2, figsize=(9.4, 4.4), width_ratios=(3, 2)) as (figure, ((left, right),)):
        for number, (name, found) in enumerate(accuracies.items()):
            bold = (
                {"color": _INK, "linewidth": 2.6}
                if name == "all"
                else {"color": COLORS[number % len(COLORS)], "linewidth": 1.3}
            )
            beside = np.array(zooms) + 0.035 * (
                number - (len(accuracies) - 1) / 2
            )  # so that no error bar covers another
            left.errorbar(beside, _percent(found), 100 * np.array([one.deviation if one else np.nan for one in found]), label=name,
                          marker=MARKERS[number % len(MARKERS)], markersize=5, capsize=2, **bold)  # fmt: skip
        for number, (name, values) in enumerate(costs.items()):
            right.plot(
                zooms,
                values,
                label=name,
                marker=MARKERS[number],
                color=COLORS[number],
                linestyle=("-", "--")[number % 2],
            )
        left.set(title="Right answers on small objects, %", ylim=(0, 100))
        right.set(title="Cost of a prompt, GFLOPs")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xticks(zooms, [f"{zoom}×" if zoom > 1 else "1×\n(LLaVA)" for zoom in zooms])
            axes.set_xlabel("side of the image over the low-resolution one's")
        right.legend(fontsize=9)
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside upper left",
            ncols=len(accuracies),
            fontsize=9,
        )


def draw_maps(
    path: Path,
    layers: Sequence[int],
    maps: Mapping[str, Mapping[str, np.ndarray]],
    flat: Mapping[str, float],
) -> None:
    """The supplement's figure 2: share of the attention map's mass in the answer boxes by layer.

    Args:
        layers: Their numbers, from 0.
        maps: Size -> system -> [seeds, layers].
        flat: Size -> the share that a flat map has there.
    """
    with _figure(path, 1, len(maps), figsize=(8.4, 3.6), sharey=True) as (figure, (panels,)):
        for axes, (size, by_system) in zip(panels, maps.items()):
            for number, (name, values) in enumerate(by_system.items()):
                style = {"color": COLORS[number], "linestyle": ("-", "--")[number % 2]}
                axes.plot(layers, 100 * values.T, linewidth=0.8, alpha=0.45, **style)
                axes.plot(
                    layers,
                    100 * values.mean(0),
                    linewidth=2.4,
                    marker=MARKERS[number],
                    label=name,
                    **style,
                )
            axes.axhline(100 * flat[size], color="#777777", linestyle=":", label="flat map")
            axes.set(title=f"{size} objects", xlabel="layer", xticks=layers)
        panels[0].set(ylabel="mass of the map in the answer boxes, %", ylim=(0, None))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)


def _percent(found: Sequence[Accuracy | None]) -> np.ndarray:
    return 100 * np.array([one.accuracy if one else np.nan for one in found])
