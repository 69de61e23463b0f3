"""The study's report as HTML: no script, nothing from elsewhere; its images are the files beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from studies.small.results import ALL, Cost, Results, title
from studies.small.statistics import Difference, Verdict, accuracy
from studies.small.tables import AccuracyRow, map_means, training_means


def make_page(
    results: Results, verdicts: Sequence[Verdict], by_task: Sequence[AccuracyRow], by_size: Sequence[AccuracyRow]
) -> str:
    """Return the page.

    Args:
        results: What the runner left.
        verdicts: All tasks of an expectation one after the other, "all" last.
        by_task: Rows of table_1_2.csv.
        by_size: Rows of table_4.csv.
    """
    remarks = results.folder / "remarks.txt"
    return _template().render(
        results=results,
        by_task={(row.system, row.objects, row.task): row.found for row in by_task},
        by_size={(row.system, row.objects): row.found for row in by_size},
        costs=[(system, results.costs[system]) for system in results.systems if system in results.costs],
        cost_of=lambda system: results.costs.get(system, Cost()),
        chance=results.chance(),
        verdicts=verdicts,
        summary=summarise(results, verdicts),
        missing=results.missing(),
        training=training_means(results),
        maps=map_means(results),
        exists=lambda name: (results.folder / name).exists(),
        described=list(_flat({name: value for name, value in results.study.items() if name != "command"})),
        command=results.study.get("command", ""),
        questions=len({(row.seed, row.number) for row in results.answers}),
        remarks=remarks.read_text(encoding="utf-8").split("\n\n") if remarks.exists() else [],
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "points": _points, "digits": _digits}
    environment.globals |= {"title": title, "holds": _holds}
    return environment.get_template("report.html")


def summarise(results: Results, verdicts: Sequence[Verdict]) -> list[str]:
    """Return sentences: against the LR model, against the other strategies, against LLaVA-HD and its cost.

    What the preset tiny found is not to be read as a result, which the first sentence then says.
    """
    by_other = {other: [one for one in verdicts if one.other == other] for other in {one.other for one in verdicts}}
    accuracies = [
        f"{name} {_percent(found.accuracy)} %"
        for system, name in (("flexattn", "FlexAttention"), ("llava", "LLaVA"))
        if (found := accuracy(results.marks(system, objects="small")))
    ]
    low_resolution = (
        f"Accuracy on small objects: {_and(accuracies) or 'none yet'}; "
        f"the expectation that FlexAttention is above LLaVA there {_which_hold(by_other['llava'])}."
    )
    strategies = (
        "The expectation that selection by the attention map is above random selection there "
        f"{_which_hold(by_other['random'])}; that it is above central selection {_which_hold(by_other['center'])}."
    )
    high_resolution = (
        "The expectation that FlexAttention is at least level with LLaVA-HD on objects of all sizes "
        f"{_which_hold(by_other['hd'])}; that it needs fewer FLOPs {_where_cheaper(results)}."
    )
    tiny = (
        "This is a run of the preset tiny, which shows that the pipeline works: its models learn nothing, so whether "
        "an expectation holds here says nothing about the systems."
    )
    return [*([tiny] if results.study.get("preset") == "tiny" else []), low_resolution, strategies, high_resolution]


@dataclass(frozen=True)
class _Finding:
    """Whether an expectation holds for something; None if that has not been tested."""

    holds: bool | None
    subject: str


def _holds(known: bool | None) -> str:
    return {True: "holds", False: "does not hold", None: "has not been tested yet"}[known]


def _which_hold(verdicts: Sequence[Verdict]) -> str:
    """Say for which tasks an expectation holds, all tasks first, with that difference and those that do not hold."""
    *tasks, overall = verdicts
    if overall.found is None:
        return _holds(None)
    return _by_outcome([_finding(overall), *map(_finding, tasks)])


def _finding(verdict: Verdict) -> _Finding:
    name = "all tasks together" if verdict.task == ALL else verdict.task
    if verdict.found and (verdict.task == ALL or not verdict.holds):
        name = f"{name} ({_with_error(verdict.found)})"
    return _Finding(verdict.holds, name)


def _where_cheaper(results: Results) -> str:
    """Say where FlexAttention needs fewer FLOPs than LLaVA-HD: in the study and at 7B, as published and as run here."""
    ours, other = (results.costs.get(system) for system in ("flexattn", "hd"))
    if not ours or not other:
        return _holds(None)
    pairs = (
        ("GFLOPs in the study as published", ours.study_gflops_published, other.study_gflops_published),
        ("GFLOPs in the study as run here", ours.study_gflops_here, other.study_gflops_here),
        ("TFLOPs at 7B as published", ours.paper_tflops_published, other.paper_tflops_published),
        ("TFLOPs at 7B as run here", ours.paper_tflops_here, other.paper_tflops_here),
    )
    return _by_outcome(
        [
            _Finding(None if math.isnan(one + two) else one < two, f"{kind} ({_digits(one)} against {_digits(two)})")
            for kind, one, two in pairs
        ]
    )


def _by_outcome(findings: Sequence[_Finding]) -> str:
    """Say for what an expectation holds, for what it does not, and for what it has not been tested."""
    parts = []
    for known in (True, False, None):
        subjects = [one.subject for one in findings if one.holds is known]
        if subjects:
            parts.append(f"{_holds(known)} for {_and(subjects)}")
    return ", but ".join(parts)


def _percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _points(difference: float | None) -> str:
    return "–" if difference is None or math.isnan(difference) else f"{100 * difference:+.1f}".replace("-", "−")


def _digits(value: float | None) -> str:
    """Format a number with three significant digits, or all before the point."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _with_error(found: Difference) -> str:
    return f"{_points(found.difference)} ± {100 * found.error:.1f} points"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _flat(values: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Yield nested dicts as lines of "a, b" and the value."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}, {key}" if name else str(key))
    elif isinstance(values, list):
        yield name, ", ".join(map(str, values))
    else:
        yield name, f"{values:.4g}" if isinstance(values, float) else str(values)
