"""What was measured: a row for each method of each comparison, as CSV, tables and plots."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import tables
import torch

from attention.comparison import About, Comparison, Errors, check
from attention.methods import METHODS, OURS


@dataclass(frozen=True)
class Speed:
    """What a method's time comes to."""

    median_us: float
    runs: int
    gb_per_s: float
    share_of_copy: float  # of the bandwidth of a large copy
    tflop_per_s: float
    over_ours: float | None  # this method's time over that of ours


@dataclass(frozen=True)
class Row:
    """A method on a comparison: its errors and speed, or why it was not timed."""

    about: About
    method: str
    note: str = ""
    errors: Errors | None = None
    moved: int | None = None  # bytes that must move once
    speed: Speed | None = None

    def columns(self) -> dict[str, Any]:
        """Return the row of the CSV file; what is not known is an empty cell."""
        speed = dict.fromkeys(field.name for field in dataclasses.fields(Speed))
        if self.speed:
            speed = dataclasses.asdict(self.speed)
        return {
            **dataclasses.asdict(self.about),
            "method": self.method,
            "error_out": self.errors and self.errors.out,
            "error_map": self.errors and self.errors.map,
            "bytes": self.moved,
            **speed,
            "note": self.note,
        }


def copy_row(bytes_copied: int, device: str, clock: Callable, seconds: float) -> Row:
    """Measure the bandwidth of a large copy, read and written."""
    source = torch.zeros(bytes_copied // 4, device=device)
    target = torch.empty_like(source)
    timing = measuring.medians({"copy": lambda: target.copy_(source)}, seconds, time_of=clock)["copy"]
    moved = 2 * bytes_copied
    speed = Speed(timing.seconds * 1e6, timing.runs, moved / timing.seconds * 1e-9, 1.0, 0.0, None)
    return Row(About("copy", "copy"), "torch", moved=moved, speed=speed)


def measure(comparison: Comparison, clock: Callable, copy: Row, seconds: float) -> list[Row]:
    """Check every method, and time those that are right, in turn; return a row for each."""
    checked = check(comparison)
    calls = {method: in_turn(comparison.methods[method]) for method in checked.errors}
    timings = measuring.medians(calls, seconds, time_of=clock) if calls else {}
    rows = []
    for method in METHODS:
        if method in timings:
            timing, ours = timings[method], timings.get("ours")
            rate = comparison.moved / timing.seconds * 1e-9
            speed = Speed(
                median_us=timing.seconds * 1e6,
                runs=timing.runs,
                gb_per_s=rate,
                share_of_copy=rate / copy.speed.gb_per_s,
                tflop_per_s=comparison.flop / timing.seconds * 1e-12,
                over_ours=timing.seconds / ours.seconds if ours else None,
            )
            rows.append(Row(comparison.about, method, "", checked.errors[method], comparison.moved, speed))
        elif method in checked.reasons:
            rows.append(Row(comparison.about, method, checked.reasons[method]))
    return rows


def in_turn(calls: list[Callable]) -> Callable:
    """Return a function that makes the next of the calls each time."""
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)

    def call_next() -> Any:
        return next(turn)()

    return call_next


def complaints(rows: list[Row]) -> list[str]:
    """Return one sentence for everything of ours that is wrong."""
    return [f"{row.about.name}, {row.method}: {row.note}" for row in rows if row.method in OURS and row.note]


def notes(rows: list[Row]) -> list[str]:
    """Return one sentence for each reason why a method was not timed, with the comparisons that it holds for."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.note:
            names.setdefault((row.method, row.note), []).append(row.about.name)
    return [f"not timed: {method} on {'; '.join(found)}: {note}" for (method, note), found in names.items()]


def print_tables(rows: list[Row], copy: Row) -> None:
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.speed:
            by_name.setdefault(row.about.name, {})[row.method] = row
    timed = [methods for methods in by_name.values() if "ours" in methods]
    print_ratios([methods for methods in timed if methods["ours"].about.case in ("prefill", "decode")])
    print_bandwidths([methods["ours"] for methods in timed if methods["ours"].about.case != "prefill"], copy)


def print_ratios(attentions: list[dict[str, Row]]) -> None:
    others = METHODS[1:]
    tables.print_table(
        "Attention: microseconds of ours, and the others' time over it (all but ours and eager compute no map)",
        ("case", "ours us", *others),
        [
            [
                methods["ours"].about.name,
                f"{methods['ours'].speed.median_us:.1f}",
                *(f"{methods[other].speed.over_ours:.2f}" if other in methods else "-" for other in others),
            ]
            for methods in attentions
        ],
    )


def print_bandwidths(ours: list[Row], copy: Row) -> None:
    tables.print_table(
        f"Bytes that must move once, over time; a large copy moves {copy.speed.gb_per_s:.0f} GB/s",
        ("case", "us", "MB", "GB/s", "share of the copy"),
        [
            [
                row.about.name,
                f"{row.speed.median_us:.1f}",
                f"{row.moved * 1e-6:.2f}",
                f"{row.speed.gb_per_s:.1f}",
                f"{row.speed.share_of_copy:.1%}",
            ]
            for row in ours
        ],
    )


def plot(rows: list[Row], machine: measuring.Machine, out: Path) -> None:
    """Draw prefill.png and decode.png. Raise ImportError where matplotlib is missing."""
    pyplot = tables.headless_pyplot()
    timed = [row for row in rows if row.speed and row.speed.over_ours is not None]
    for name, draw in (("prefill", plot_prefill), ("decode", plot_decode)):
        figure = draw(pyplot, [row for row in timed if row.about.case == name])
        figure.suptitle(f"{name}: {machine}")
        figure.savefig(out / f"{name}.png", dpi=120)


def plot_prefill(pyplot, rows: list[Row]):
    """Draw the time over ours by selected HR tokens, a panel for each preset and batch."""
    panels = sorted({(row.about.preset, row.about.batch) for row in rows})
    width = max(1, len(panels))
    figure, axes = pyplot.subplots(1, width, figsize=(4.5 * width, 4), layout="constrained", squeeze=False)
    for (preset, batch), axis in zip(panels, axes[0]):
        shown = [row for row in rows if (row.about.preset, row.about.batch) == (preset, batch)]
        for method in METHODS:
            points = sorted((row.about.selected, row.speed.over_ours) for row in shown if row.method == method)
            if points:
                axis.plot(*zip(*points), marker="o", label=method)
        axis.set(title=f"{preset}, batch {batch}", xlabel="selected HR tokens", ylabel="time over ours", yscale="log")
        axis.grid(alpha=0.3)
    if panels:
        axes[0][0].legend(fontsize="small")
    return figure


def plot_decode(pyplot, rows: list[Row]):
    """Draw the share of a large copy's bandwidth, a bar for each row."""
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.18 * len(rows)), layout="constrained")
    axis.barh(
        [f"B={row.about.batch} M={row.about.selected} {row.method}" for row in rows],
        [row.speed.share_of_copy for row in rows],
        color=["tab:blue" if row.method in OURS else "tab:gray" for row in rows],
    )
    axis.set(xlabel="share of the bandwidth of a large copy")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize="x-small")
    return figure
