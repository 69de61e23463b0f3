"""The page of `flexattn eval`: what it says, and how it looks in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
import question_files

from flexattn_cuda.evaluation.report import figure_of, write_report
from flexattn_cuda.evaluation.results import Cost, Metric, Picture, TaskResult, comparisons
from flexattn_cuda.tasks.options import EvalOptions

SCORES = {"llava": [0.10, 0.24, 0.31], "flexattn": [0.10, 0.24, 0.47]}


def result(system: str, task: str, figures: dict[str, float], pictures: tuple[Picture, ...] = ()) -> TaskResult:
    metrics = {name: Metric(value, max(0, value - 0.1), min(1, value + 0.1), 40) for name, value in figures.items()}
    spent = {"llava": 8.0, "flexattn": 16.0, "crop": 24.0}[system]
    cost = Cost(40, 61.0, None, None, spent, spent, None, 30.0, 0.75, None, 80, 0)
    return TaskResult(system, task, metrics, [], cost, list(pictures))


def results(crop: float = 0.9) -> list[TaskResult]:
    shown = tuple(
        Picture(f"{n}.jpg", bool(n), "What does the sign say? " * (1 + 4 * n), "7" * (4 + 50 * n), "7") for n in (0, 1)
    )
    return [
        *(result(system, "vstar_bench_loss", {"vstar_acc": 0.5}, shown) for system in ("llava", "flexattn")),
        result("crop", "vstar_bench_loss", {"vstar_acc": crop}),
        *(
            result(system, "gqa_map", {f"gqa_map_layer_{layer:02d}": score for layer, score in enumerate(own)})
            for system, own in SCORES.items()
        ),
        result("flexattn", "mmvet", {}),
    ]


def page(folder: Path, found: list[TaskResult]) -> str:
    write_report(
        EvalOptions(
            output=folder,
            systems="llava,flexattn,crop",
            model="/a/folder/with/a/name/that/is/longer/than/a/phone/is/wide",
        ),
        found,
    )
    return (folder / "report.html").read_text()


def test_the_maps_are_drawn_by_layer():
    figure = figure_of(results())
    assert {curve.system: list(curve.values.values()) for curve in figure.curves} == SCORES
    assert [label for _, label in figure.layers] == ["0", "1", "2"]
    (zero, _), *_, (top, label) = figure.scores
    for curve in figure.curves:
        heights = [(zero - y) / (zero - top) * float(label) for _, y in curve.points]
        assert heights == pytest.approx(SCORES[curve.system])
        assert [x for x, _ in curve.points] == [x for x, _ in figure.layers]
    assert float(label) >= 0.47
    assert figure_of([one for one in results() if one.task != "gqa_map"]) is None


@pytest.mark.parametrize("crop, sentence", [(0.9, "ahead of FlexAttention in V* overall"), (0.5, "in no column")])
def test_the_page_says_where_cropping_is_ahead_and_at_what_cost(tmp_path, crop, sentence):
    [one] = comparisons(results(crop))
    assert (one.better, one.flops) == (crop == 0.9, 1.5)
    assert one.apart == (crop == 0.9)
    assert sentence in " ".join(page(tmp_path, results(crop)).split())


def test_the_page_says_what_no_judge_scored(tmp_path, monkeypatch):
    sentence = "The answers to mmvet are written unscored, to samples/SYSTEM/mmvet.jsonl: its judge needs a key in "
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert sentence + "OPENAI_API_KEY" in page(tmp_path, results())
    monkeypatch.setenv("API_TYPE", "azure")
    assert sentence + "AZURE_API_KEY" in page(tmp_path, results())
    monkeypatch.setenv("AZURE_API_KEY", "a key")
    assert "unscored" not in page(tmp_path, results())


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_a_desktop_and_a_phone(tmp_path, browser, width):
    (tmp_path / "pictures").mkdir()
    for number in (0, 1):
        question_files.image(640, 480, seed=number).save(tmp_path / "pictures" / f"{number}.jpg")
    page(tmp_path, results())
    shown, errors = browser.new_page(viewport={"width": width, "height": 900}), []

    def note(problem: object) -> None:
        errors.append(problem)

    shown.on("pageerror", note)
    shown.on("requestfailed", note)
    shown.goto((tmp_path / "report.html").as_uri())
    shown.screenshot(path=tmp_path / "page.png", full_page=True)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    assert shown.evaluate("[...document.images].every(one => one.naturalWidth > 0)") and not errors
    boxes = shown.evaluate(
        "[...document.querySelectorAll('svg, figure')].map(one => one.getBoundingClientRect().right)"
    )
    assert boxes and max(boxes) <= width
    smallest = shown.evaluate(
        "Math.min(...[...document.querySelectorAll('.figure text')].map(one => one.getBoundingClientRect().height))"
    )
    assert smallest >= 10, "the labels of the figure are too small to read"
    shown.evaluate("document.querySelectorAll('.scroll').forEach(one => one.scrollLeft = 200)")
    lefts = shown.evaluate("[...document.querySelectorAll('tbody th')].map(one => one.getBoundingClientRect().left)")
    assert min(lefts) >= 0, "the name of a system is not beside its figures when a table is scrolled"
