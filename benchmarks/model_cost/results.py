"""Ratios, rows and plots of what was measured."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tables
from measuring import Machine

from model_cost.measure import Measured

# What a ratio must not exceed, with the default shape on the CPU.
LIMITS = {
    "prefill_m10": 1.10,
    "decode_m10": 1.10,
    "decode_m43": 1.25,
    "decode_m100": 1.50,
    "decode_m10_churn10": 1.50,
    "plain_over_transformers_prefill": 1.03,
    "plain_over_transformers_decode": 1.03,
    "prefill_m10_over_hd": 0.45,
    "tiles_encoded_2_of_9": 2,
}
LINES = ("LLaVA", "M = 10 %", "M = 10 %, off", "M = 100 %", "M = 43 %, off", "LLaVA-HD")  # of the plot by length


@dataclass(frozen=True)
class Where:
    """On what it was measured."""

    machine: Machine
    shape: str
    dtype: str
    threads: int

    def columns(self) -> dict[str, str | int]:
        own = {"shape": self.shape, "dtype": self.dtype, "threads": self.threads}
        return self.machine.columns() | own


@dataclass(frozen=True)
class Row:
    """The medians of a system. The fields are columns of the table."""

    system: str
    prefill_s: float
    prefill_over_llava: float
    decode_s_per_token: float
    decode_over_llava: float
    prefill_peak_mib: float
    decode_peak_mib: float
    hr_tokens_projected: int


@dataclass(frozen=True)
class Zoom:
    """The rows of one image size."""

    zoom: int
    rows: list[Row]

    def columns(self, where: Where) -> list[dict[str, str | int | float]]:
        return [where.columns() | {"zoom": self.zoom} | dataclasses.asdict(row) for row in self.rows]


def make_rows(found: list[Measured]) -> list[Row]:
    plain = next(measured for measured in found if measured.system.name == "LLaVA")
    return [
        Row(
            measured.system.name,
            prefill_s=round(measured.prefill_seconds, 5),
            prefill_over_llava=round(measured.prefill_seconds / plain.prefill_seconds, 4),
            decode_s_per_token=round(measured.token_seconds, 6),
            decode_over_llava=round(measured.token_seconds / plain.token_seconds, 4),
            prefill_peak_mib=round(measured.prefill_bytes / 2**20, 1),
            decode_peak_mib=round(measured.decode_bytes / 2**20, 1),
            hr_tokens_projected=measured.projected,
        )
        for measured in found
    ]


def ratios(found: list[Measured]) -> dict[str, float]:
    """Return ratios of medians, of prefills and of generated tokens."""
    by_name = {measured.system.name: measured for measured in found}

    def prefill(one: str, other: str) -> float:
        return by_name[one].prefill_seconds / by_name[other].prefill_seconds

    def decode(one: str, other: str) -> float:
        return by_name[one].token_seconds / by_name[other].token_seconds

    return {
        "prefill_m10": prefill("M = 10 %", "LLaVA"),
        "decode_m10": decode("M = 10 %", "LLaVA"),
        "decode_m43": decode("M = 43 %", "LLaVA"),
        "decode_m100": decode("M = 100 %", "LLaVA"),
        "decode_m10_churn10": decode("M = 10 %, churn", "LLaVA"),
        "plain_over_transformers_prefill": prefill("LLaVA", "transformers, sdpa"),
        "plain_over_transformers_decode": decode("LLaVA", "transformers, sdpa"),
        "prefill_m10_over_hd": prefill("M = 10 %", "LLaVA-HD"),
    }


def print_rows(title: str, rows: list[Row]) -> None:
    header = [field.name for field in dataclasses.fields(Row)]
    tables.print_table(title, header, [[str(cell) for cell in dataclasses.astuple(row)] for row in rows])


def print_ratios(numbers: dict[str, float], limited: bool) -> None:
    if limited:
        rows = [[name, f"{value:.3f}", f"{LIMITS[name]:g}"] for name, value in numbers.items()]
        tables.print_table("Ratios", ["ratio", "measured", "limit"], rows)
    else:
        tables.print_table("Ratios", ["ratio", "measured"], [[name, f"{value:.3f}"] for name, value in numbers.items()])


def plot(folder: Path, found: list[Measured], zooms: Sequence[Zoom]) -> None:
    """Draw cost_by_length.png and, for several image sizes, cost_by_resolution.png."""
    pyplot = tables.headless_pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    plot_by_length(pyplot, found).savefig(folder / "cost_by_length.png", dpi=150, bbox_inches="tight")
    if zooms:
        plot_by_resolution(pyplot, zooms).savefig(folder / "cost_by_resolution.png", dpi=150, bbox_inches="tight")


def plot_by_length(pyplot, found: list[Measured]):
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for measured in found:
        if measured.system.name in LINES:
            steps = [statistics.median(step) for step in zip(*measured.decode)]
            total = list(itertools.accumulate([measured.prefill_seconds, *steps]))
            axes.plot(range(len(total)), total, label=measured.system.name)
    axes.set(xlabel="generated tokens", ylabel="seconds since the prompt", title="Cost by generated length")
    axes.set(ylim=(0, None))
    axes.legend()
    return figure


def plot_by_resolution(pyplot, zooms: Sequence[Zoom]):
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.5))
    names = [row.system for row in zooms[0].rows if row.system != "LLaVA"]
    columns = {"Prefill": "prefill_over_llava", "Decode, per token": "decode_over_llava"}
    for axes, (title, ratio) in zip(panels, columns.items()):
        for name in names:
            points = [(zoom.zoom, getattr(row, ratio)) for zoom in zooms for row in zoom.rows if row.system == name]
            axes.plot(*zip(*points), marker="o", label=name)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xlabel="zoom (side of the image in tiles)", ylabel="time over LLaVA's", title=title, ylim=(0, None))
        axes.legend()
    return figure
