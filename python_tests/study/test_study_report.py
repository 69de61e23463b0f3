"""The study's report, on made-up results whose figures can be computed by hand."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from small_study import read_csv

pytest.importorskip("matplotlib")

from flexattn_cuda.errors import InputError
from studies.small import figures, statistics
from studies.small.collection import costs
from studies.small.outcomes import Selection
from studies.small.presets import SYSTEMS
from studies.small.report import write_report
from studies.small.results import TITLES, Results, write_csv
from studies.small.small_model import ModelSizes

TASKS = ("attribute", "text")
# Right answers to the 10 questions of a task and a size, by seed; question k is right where k is below the figure.
SMALL = {"llava": {"attribute": (3, 2, 4), "text": (5, 5, 5)}, "flexattn": {"attribute": (9, 8, 9), "text": (6, 4, 5)}}
LARGE = 8  # of every system


def answers(systems=("llava", "hd", "flexattn", "random", "center"), seeds=(0, 1, 2)):
    """LLaVA-HD answers as FlexAttention, the strategies as LLaVA."""
    rows = []
    for seed in seeds:
        for system in systems:
            like = SMALL["flexattn" if system in ("flexattn", "hd") else "llava"]
            asked = [(task, size, k) for size in ("small", "large") for task in TASKS for k in range(10)]
            for number, (task, size, k) in enumerate(asked):
                right = k < (like[task][seed] if size == "small" else LARGE)
                row = {"seed": seed, "system": system, "number": number, "task": task, "size": size}
                row |= {"question": "What?", "expected": "4 7", "answer": "4 7" if right else "1 1"}
                rows.append(row | {"right": int(right)})
    return rows


def fill(folder, **given):
    """A study's results; `given` stands in for `answers()`."""
    write_csv(folder / "answers.csv", answers(**given))
    about = {"command": "python -m studies.small <out>", "seeds": [0, 1, 2], "chance": {"attribute": 0.2, "text": 0.01}}
    (folder / "study.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished study, with its report."""
    folder = fill(tmp_path_factory.mktemp("results"), systems=tuple(TITLES))
    at = {"mass": 0.1, "largest": 0.5, "boxes": 0.05}
    write_csv(
        folder / "maps.csv",
        [
            {"seed": seed, "system": system, "layer": layer, "size": size} | at | {"mass": 0.1 + 0.2 * seed}
            for seed in range(3)
            for system in ("llava", "flexattn")
            for layer in range(2)
            for size in ("small", "large")
        ],
    )
    costs = ("study_gflops_published", "study_gflops_here", "paper_tflops_published", "paper_tflops_here")
    write_csv(
        folder / "costs.csv",
        [
            {"system": system, **dict(zip(costs, (5 - k, 1 + k, 9 + k, 8 + k))), "selected_share": share}
            for k, (system, share) in enumerate((("llava", ""), ("flexattn", 0.1), ("hd", "")))
        ],
    )
    training = {"system": "flexattn", "steps": 100, "final_loss": 0.5, "selected_share": 0.1}
    minutes = [{"seed": seed, **training, "train_seconds": 60 * (1 + seed)} for seed in range(3)]
    write_csv(folder / "systems.csv", minutes)
    (folder / "examples").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "examples" / "1.png")
    example = {"file": "examples/1.png", "caption": "a <sign>", "question": "What?", "expected": "4 7"}
    example["answers"] = {"flexattn": "4 7", "llava": "1 1"}
    (folder / "examples.json").write_text(json.dumps([example]))
    (folder / "remarks.txt").write_text("Two & two.\n\nMore.")
    write_report(folder)
    return folder


@pytest.fixture
def page(finished):
    return (finished / "report.html").read_text()


def test_every_system_of_the_study_has_a_title():
    assert sorted(SYSTEMS) == sorted(TITLES)


def row_of(rows, **wanted):
    (found,) = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return found


def sentences(page):
    return re.findall(r"<p>(.*?)</p>", re.search(r'id="answer">(.*?)</div>', page, re.DOTALL).group(1))


@pytest.mark.slow
def test_accuracies_are_means_over_seeds_with_wilsons_interval_over_questions(finished):
    row = row_of(read_csv(finished / "table_1_2.csv"), system="flexattn", objects="small", task="attribute")
    assert float(row["accuracy"]) == pytest.approx((0.9 + 0.8 + 0.9) / 3, rel=1e-5)
    assert float(row["deviation"]) == pytest.approx(math.sqrt(((1 / 30) ** 2 * 2 + (2 / 30) ** 2) / 2), rel=1e-5)
    share, n, z = 26 / 30, 30, 1.96
    middle = (share + z**2 / 60) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert [float(row["wilson_low"]), float(row["wilson_high"])] == pytest.approx(
        [middle - half, middle + half], rel=1e-5
    )
    assert (row["questions"], row["seeds"]) == ("30", "3")


def test_objects_by_size(finished):
    rows = read_csv(finished / "table_4.csv")
    found = [float(row_of(rows, system="llava", objects=size)["accuracy"]) for size in ("small", "large", "all")]
    assert found == pytest.approx([24 / 60, 0.8, (24 + 48) / 120], rel=1e-5)


def test_differences_are_paired_by_question(finished):
    row = row_of(read_csv(finished / "differences.csv"), minus="llava", task="attribute")
    # 6, 6 and 5 of 10 questions are won, none is lost.
    assert [float(row[f"seed_{seed}"]) for seed in range(3)] == [0.6, 0.6, 0.5]
    assert float(row["difference"]) == pytest.approx(17 / 30, rel=1e-5)
    assert float(row["error_questions"]) == pytest.approx(math.sqrt(17 / 30 * 13 / 30 / 29), rel=1e-5)
    assert float(row["error_seeds"]) == pytest.approx(math.sqrt((2 * (1 / 30) ** 2 + (2 / 30) ** 2) / 2 / 3), rel=1e-5)
    assert {row["same_sign"], row["over_two_standard_errors"], row["holds"]} == {"yes"}


def test_a_difference_that_does_not_hold_is_reported_as_not_holding(finished, page):
    row = row_of(read_csv(finished / "differences.csv"), minus="llava", task="text")
    assert float(row["difference"]) == 0
    assert {row["same_sign"], row["over_two_standard_errors"], row["holds"]} == {"no"}
    first, second, third = sentences(page)
    holding = r" holds for all tasks together \([^)]*\) and attribute, "
    for sentence in (first, second):
        assert re.search(holding + r"but does not hold for text \(\+0\.0 ± [0-9.]+ points\)", sentence)
    assert "LLaVA-HD" in third and "does not hold" not in third.split(";")[0]


def test_a_system_that_is_behind_is_not_level(tmp_path):
    rows = answers()
    for row in rows:
        if row["system"] == "hd":
            row["right"] = 1
    write_csv(tmp_path / "answers.csv", rows)
    page = write_report(tmp_path).read_text()
    assert row_of(read_csv(tmp_path / "differences.csv"), minus="hd", task="all")["holds"] == "no"
    expectation = "at least level with LLaVA-HD on objects of all sizes"
    assert f"{expectation} does not hold for all tasks together (−" in sentences(page)[2]


def test_seeds_that_disagree_do_not_hold():
    """Many questions in favour but one seed against: neither the sign nor the error over seeds supports it."""
    one = {seed: dict.fromkeys(range(1000), seed != 2) for seed in range(3)}
    other = {seed: dict.fromkeys(range(1000), seed == 2) for seed in range(3)}
    found = statistics.paired_difference(one, other)
    assert found.difference == pytest.approx(1 / 3) and found.difference > 2 * found.error_questions
    assert not found.same_sign and not found.over_two_standard_errors and not found.above


def test_questions_that_only_one_system_answered_do_not_count():
    found = statistics.paired_difference(
        {0: {1: True, 2: True, 3: False}, 1: {1: True}}, {0: {1: True, 2: False, 9: True}}
    )
    assert (found.difference, found.questions, list(found.by_seed)) == (0.5, 2, [0])
    assert statistics.paired_difference({0: {1: True}}, {1: {1: True}}) is None


def test_a_run_of_the_preset_tiny_says_that_it_proves_nothing(tmp_path, page):
    about = json.loads((fill(tmp_path) / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps(about | {"preset": "tiny"}))
    told = sentences(write_report(tmp_path).read_text())
    assert "its models learn nothing" in told[0] and len(told) == 1 + len(sentences(page))
    assert "learn nothing" not in page


def test_costs_and_fewer_flops(finished, page):
    row = row_of(read_csv(finished / "table_1_2.csv"), system="hd", objects="all", task="all")
    columns = ("study_gflops_published", "study_gflops_here", "paper_tflops_published", "selected_share")
    assert [row[name] for name in columns] == ["3", "3", "11", ""]
    assert sentences(page)[2].endswith(
        "needs fewer FLOPs holds for GFLOPs in the study as run here (2 against 3), "
        "TFLOPs at 7B as published (10 against 11) and TFLOPs at 7B as run here (9 against 10), "
        "but does not hold for GFLOPs in the study as published (4 against 3)."
    )


@pytest.mark.slow
@pytest.mark.parametrize("share, tiles", [(0.55, 2.5), (0.26, 1.04)])
def test_costs_are_counted_whatever_the_maps_select(share, tiles):
    """At zoom 2: means over questions, each of which selects in no more tiles than hold its tokens."""
    row = costs("flexattn-zoom2", ModelSizes(), Selection(share, tiles))
    assert row["selected_share"] == share
    assert 0 < row["study_gflops_here"] < 10 and 0 < row["paper_tflops_here"] < row["paper_tflops_published"]


def test_the_report_of_an_unfinished_study_lists_what_is_missing(tmp_path):
    folder = fill(tmp_path)
    under_way = {("llava", 0): 40, ("llava", 2): 40, ("flexattn", 0): 40, ("flexattn", 1): 40, ("flexattn", 2): 30}
    rows = [row for row in answers() if row["number"] < under_way.get((row["system"], row["seed"]), 0)]
    write_csv(folder / "answers.csv", rows)
    page = write_report(folder).read_text()
    told = re.search(r'id="missing".*?</div>', page, re.DOTALL).group(0)
    assert "Seed 1 lacks answers from: LLaVA, low resolution; LLaVA-HD;" in told
    assert "Seed 2: FlexAttention has answered 30 of 40 questions." in told
    assert "costs.csv is missing or empty." in told
    assert sentences(page)[1].count("has not been tested yet") == 2
    assert row_of(read_csv(folder / "differences.csv"), minus="random", task="all")["holds"] == ""


def test_a_single_seed_is_pointed_out(tmp_path):
    write_csv(tmp_path / "answers.csv", answers(seeds=(0,)))
    assert "There is only one seed" in Results.read(tmp_path).missing()[0]


def test_a_finished_study_misses_nothing(page):
    assert 'id="missing"' not in page


class Page(HTMLParser):
    """Tags that are open, and the sources, texts and links of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_the_files_beside_it(finished, page):
    parsed = Page(page)
    images = [attributes for tag, attributes in parsed.attributes if tag == "img"]
    assert parsed.open == [] and len(images) == 4
    assert all((finished / one["src"]).is_file() and one["alt"] for one in images)
    assert not {"script", "link", "iframe"} & set(parsed.tags) and "http" not in page and "url(" not in page
    assert parsed.tags.count("caption") == parsed.tags.count("table") == 6
    assert "a &lt;sign&gt;" in page and "python -m studies.small &lt;out&gt;" in page and "Two &amp; two." in page


def test_the_page_says_which_maps_were_supervised(page):
    told = "layer before the first high-resolution layer and of all later ones"
    assert " ".join(page.split()).count(told) == 2  # beside the figure of the maps, and where the training is described


@pytest.mark.slow
def test_the_report_is_the_same_when_made_again(finished, page):
    assert write_report(str(finished)).read_text() == page


def test_a_report_without_matplotlib_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="need matplotlib; run pip install matplotlib"):
        write_report(fill(tmp_path))


def test_a_report_without_answers_is_refused(tmp_path):
    folder = fill(tmp_path)
    (folder / "answers.csv").write_text("")
    with pytest.raises(InputError, match="answers.csv holds no answers"):
        write_report(folder)
    (folder / "answers.csv").write_text("seed,system\n0,llava\n")
    with pytest.raises(InputError, match="answers.csv has no column number, task, size, right"):
        write_report(folder)


def test_a_table_with_a_wrong_value_is_refused(tmp_path):
    folder = fill(tmp_path)
    write_csv(
        folder / "maps.csv",
        [{"seed": 0, "system": "llava", "layer": "first", "size": "small", "mass": 0.1, "boxes": 0}],
    )
    with pytest.raises(InputError, match="maps.csv cannot be read: .*'first'"):
        write_report(folder)
