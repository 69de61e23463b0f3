"""The study's report as HTML: no script, nothing from outside; its images are the files beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from studies.small.results import ALL, COSTS, Results, means, title
from studies.small.statistics import Difference, Verdict, accuracy


def make_page(results: Results, verdicts: Sequence[Verdict], by_task: Sequence[dict], by_size: Sequence[dict]) -> str:
    """The page.

    Args:
        verdicts: All tasks of an expectation one after the other, "all" last.
        by_task, by_size: Rows of table_1_2.csv and table_4.csv.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "points": _points, "digits": _digits}
    systems = sorted(
        (row for row in results.systems if row["system"] in results.there),
        key=lambda row: results.there.index(row["system"]),
    )
    remarks = results.folder / "remarks.txt"
    return environment.get_template("report.html").render(
        results=results, title=title, cells={(row["system"], row["objects"], row["task"]): row for row in by_task},
        sizes={(row["system"], row["objects"]): row for row in by_size},
        costs=[(system, results.costs[system]) for system in results.there if system in results.costs],
        chance=results.chance(), verdicts=verdicts, answer=answer(results, verdicts), missing=results.missing(),
        training=means(systems, ("system",), ("steps", "final_loss", "selected_share", "train_seconds")),
        maps=means(results.maps, ("system", "size", "layer"), ("mass", "largest", "boxes")),
        holds=_holds, there=lambda name: (results.folder / name).exists(),
        described=list(_flat({name: value for name, value in results.study.items() if name != "command"})),
        command=results.study.get("command", ""), questions=len({(row["seed"], row["number"]) for row in results.answers}),
        remarks=remarks.read_text(encoding="utf-8").split("\n\n") if remarks.exists() else [],
    )  # fmt: skip


def answer(results: Results, verdicts: Sequence[Verdict]) -> list[str]:
    """Three sentences: against the low-resolution model, against the other strategies, against LLaVA-HD and its cost."""
    by_other = {other: [one for one in verdicts if one.other == other] for other in {one.other for one in verdicts}}
    shares = [
        f"{name} {_percent(found.accuracy)} %"
        for system, name in (("flexattn", "FlexAttention"), ("llava", "LLaVA"))
        if (found := accuracy(results.marks(system, objects="small")))
    ]
    low_resolution = (
        f"Right answers about small objects: {_and(shares) or 'none yet'}; "
        f"that FlexAttention is above LLaVA there {_listed(by_other['llava'])}."
    )
    strategies = (
        f"That selection by the attention map is above random selection there {_listed(by_other['random'])}; "
        f"that it is above selection of the center {_listed(by_other['center'])}."
    )
    high_resolution = (
        f"That FlexAttention is at least level with LLaVA-HD, over objects of all sizes, {_listed(by_other['hd'])}; "
        f"that it needs fewer FLOPs {_cheaper(results)}."
    )
    return [low_resolution, strategies, high_resolution]


def _holds(known: bool | None) -> str:
    return {True: "holds", False: "does not hold", None: "is not measured yet"}[known]


def _listed(verdicts: Sequence[Verdict]) -> str:
    """Which of them hold, over all tasks first, with the differences of that and of those that do not hold."""
    if verdicts[-1].found is None:
        return _holds(None)
    told = []
    for one in (verdicts[-1], *verdicts[:-1]):
        name = "all tasks together" if one.task == ALL else one.task
        told.append(
            (
                one.holds,
                f"{name} ({_with_error(one.found)})" if one.found and (one.task == ALL or not one.holds) else name,
            )
        )
    return _by_outcome(told)


def _cheaper(results: Results) -> str:
    """At the study's sizes and at 7B, as published and as run here."""
    ours, other = (results.costs.get(system) for system in ("flexattn", "hd"))
    if not ours or not other:
        return _holds(None)
    kinds = [
        f"{unit} {how}" for unit in ("GFLOPs in the study", "TFLOPs at 7B") for how in ("as published", "as run here")
    ]
    told = []
    for name, kind in zip(COSTS[:4], kinds, strict=True):
        one, two = ours[name], other[name]
        told.append(
            (
                None if math.isnan(one + two) else one < two,
                f"{kind} ({_digits(one)} against {_digits(two)})",
            )
        )
    return _by_outcome(told)


def _by_outcome(told: Sequence[tuple[bool | None, str]]) -> str:
    """For which things it holds, for which it does not and for which it is not known, of (holds, thing)."""
    names = {known: [name for one, name in told if one is known] for known in (True, False, None)}
    return ", but ".join(f"{_holds(known)} for {_and(some)}" for known, some in names.items() if some)


def _percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _points(difference: float | None) -> str:
    return "–" if difference is None or math.isnan(difference) else f"{100 * difference:+.1f}".replace("-", "−")


def _digits(value: float | None) -> str:
    """Three significant digits, or all before the point."""
    return "–" if value is None or math.isnan(value) else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _with_error(found: Difference) -> str:
    return f"{_points(found.difference)} ± {100 * found.error:.1f} points"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _flat(values: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested dicts as lines of "a, b" and the value."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}, {key}" if name else str(key))
    elif isinstance(values, list):
        yield name, ", ".join(map(str, values))
    else:
        yield name, f"{values:.4g}" if isinstance(values, float) else str(values)
