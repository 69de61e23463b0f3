"""lmms-eval itself, on data in the benchmarks' own formats: its metrics are those of a loop of our own."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluation_data
import pytest
import question_files
from question_files import image
from test_scoring import by_hand

from flexattn_cuda import evaluation
from flexattn_cuda.errors import InputError
from flexattn_cuda.evaluation.scoring import Candidate
from flexattn_cuda.inputs.image_sources import read_image
from flexattn_cuda.tasks.ask import ask
from flexattn_cuda.tasks.load import load

pytestmark = [pytest.mark.slow, pytest.mark.harness]

TASKS = Path(evaluation.__file__).parent / "tasks"
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.fail("lmms-eval is not installed; pip install 'flexattn_cuda[eval]', or pass -m 'not harness'")


def run_lmms_eval(arguments: list[str], folder: Path, processes: int = 1) -> None:
    """Run lmms-eval's own command in a folder, by torchrun if there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "lmms_eval", *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------- lmms-eval's tasks


@pytest.fixture(scope="module")
def yes_or_no(tmp_path_factory):
    """The folder of a checkpoint that answers any question with yes or no, by the image."""
    return evaluation_data.save_with_two_answers(tmp_path_factory.mktemp("yes_or_no"), "yes", "no")


@pytest.fixture(scope="module")
def answer(yes_or_no):
    """Returns what `ask` answers."""
    model, processor = load(yes_or_no, device="cpu")
    return lambda row, question: ask(model, processor, row["image"], question, max_new_tokens=1).text


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory, answer):
    """(folder, rows of each benchmark): what lmms-eval's tasks take for the repositories on the hub."""
    folder = tmp_path_factory.mktemp("data")
    return folder, evaluation_data.write_benchmarks(
        folder, lambda row: answer(row, row["question"].capitalize() + SHORT)
    )


@pytest.fixture(scope="module", params=[1, 3], ids=["one by one", "in batches"])
def results(request, benchmarks, yes_or_no, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What lmms-eval's own command writes, in a folder where the repositories lie."""
    folder, out = benchmarks[0], tmp_path_factory.mktemp("out")
    arguments = ["--model", "flexattn", "--model_args", f"pretrained={yes_or_no}", "--device", "cpu"]
    arguments += ["--tasks", "pope,mme,textvqa_val", "--gen_kwargs", "max_new_tokens=1"]
    arguments += ["--batch_size", str(request.param), "--output_path", str(out)]
    run_lmms_eval(arguments, folder)
    [written] = out.rglob("*results.json")
    return json.loads(written.read_text())["results"]


def test_pope_is_what_a_loop_over_its_questions_gives(results, benchmarks, answer):
    rows = benchmarks[1]["POPE"]
    pairs = [(answer(row, row["question"] + SHORT), row["answer"]) for row in rows]
    assert len(set(pairs)) == 4  # yes and no, right and wrong
    right, positive = pairs.count(("yes", "yes")), sum(said == "yes" for said, _ in pairs)
    precision, recall = right / positive, right / sum(gold == "yes" for _, gold in pairs)
    expected = {
        "pope_accuracy": sum(said == gold for said, gold in pairs) / len(pairs),
        "pope_precision": precision,
        "pope_recall": recall,
        "pope_f1_score": 2 * precision * recall / (precision + recall),
    }
    assert {name: results["pope"][f"{name},none"] for name in expected} == expected


def test_mme_is_what_a_loop_over_its_questions_gives(results, benchmarks, answer):
    """A category has as many points as percent of its questions, and of its images with both, are right."""
    right: dict[str, dict[str, list[bool]]] = {}
    for row in benchmarks[1]["MME"]:
        said = answer(row, row["question"].removesuffix(" Please answer yes or no.") + SHORT)
        images = right.setdefault(row["category"], {})
        images.setdefault(row["question_id"], []).append(said == row["answer"].lower())
    points = {
        category: sum(50 * sum(both) + 100 * all(both) for both in images.values()) / len(images)
        for category, images in right.items()
    }
    assert results["mme"]["mme_perception_score,none"] == points["existence"]
    assert results["mme"]["mme_cognition_score,none"] == points["code_reasoning"]
    assert 0 < sum(points.values()) < 400


def test_textvqa_is_what_a_loop_over_its_questions_gives(results, benchmarks, answer):
    """Each answer of ten is left out once: an answer that three of the others give is right."""
    accuracies = []
    for row in benchmarks[1]["textvqa"]:
        said, golds = answer(row, row["question"].capitalize() + SHORT), row["answers"]
        others = [golds[:number] + golds[number + 1 :] for number in range(10)]
        accuracies.append(sum(min(1, one.count(said) / 3) for one in others) / 10)
    assert results["textvqa_val"]["exact_match,none"] == pytest.approx(sum(accuracies) / len(accuracies), abs=1e-12)
    assert len(set(accuracies)) > 3


# ---------------------------------------------------------------------------------------------------------- our tasks


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """evaluate(model_args, tasks, **options) -> what `simple_evaluate` returns, with this package's tasks."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    os.environ.setdefault("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lambda model_args, tasks, **options: simple_evaluate(
        "flexattn", model_args, tasks=tasks, task_manager=manager, device="cpu", bootstrap_iters=0, **options
    )


def losses_in(sample: dict[str, Any]) -> list[float]:
    return [ast.literal_eval(text)[0] for text in sample["filtered_resps"]]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("system", ["flexattn", "xattn"])
def test_vstar_is_scored_by_the_loss_of_each_option(evaluate, checkpoint, vstar, system, batch_size):
    from flexattn_cuda.evaluation import vstar as reader

    found = evaluate(
        f"pretrained={checkpoint},system={system},dtype=float64", ["vstar_bench_loss"], batch_size=batch_size
    )
    model, processor = load(checkpoint, device="cpu", dtype="float64", system=system)
    right: dict[str, list[float]] = {}
    samples = sorted(found["samples"]["vstar_bench_loss"], key=lambda sample: sample["doc_id"])
    for question, sample in zip(reader.read_questions(vstar), samples, strict=True):
        asked = f"{question.question}{SHORT}"
        candidates = [Candidate([read_image(question.image)], asked, option) for option in question.options]
        losses = [by_hand(model, processor, candidate)[0] for candidate in candidates]
        assert losses_in(sample) == pytest.approx(losses, abs=1e-5)
        right.setdefault(question.category, []).append(float(losses[0] == min(losses)))
    metrics = found["results"]["vstar_bench_loss"]
    everything = [one for each in right.values() for one in each]
    assert metrics["vstar_acc,none"] == sum(everything) / len(everything)
    for category, own in right.items():
        assert metrics[f"vstar_{category}_acc,none"] == sum(own) / len(own)


def test_two_processes_score_as_one_does(evaluate, checkpoint, vstar, tmp_path):
    arguments = ["--model", "flexattn", "--model_args", f"pretrained={checkpoint}", "--device", "cpu"]
    arguments += ["--include_path", str(TASKS), "--tasks", "vstar_bench_loss", "--log_samples"]
    run_lmms_eval([*arguments, "--output_path", str(tmp_path / "out")], tmp_path, processes=2)
    [written] = (tmp_path / "out").rglob("*samples*.jsonl")
    shared = {sample["doc_id"]: sample for sample in question_files.read(written)}
    [alone] = evaluate(f"pretrained={checkpoint}", ["vstar_bench_loss"], batch_size=1)["samples"].values()
    assert len(shared) == len(alone) == sum(map(len, evaluation_data.VSTAR.values()))
    for sample in alone:
        assert losses_in(shared[sample["doc_id"]]) == pytest.approx(losses_in(sample), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_magnifierbench_is_what_a_loop_over_its_questions_gives(evaluate, tmp_path, monkeypatch, batch_size):
    from flexattn_cuda.evaluation import magnifier

    folder = evaluation_data.save_with_two_answers(tmp_path / "model", "A", "C")
    rows = evaluation_data.write_magnifierbench(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = evaluate(f"pretrained={folder}", ["magnifierbench"], batch_size=batch_size, gen_kwargs="max_new_tokens=1")
    model, processor = load(folder, device="cpu")
    said = [ask(model, processor, row["images"], magnifier.prompt(row), max_new_tokens=1).text for row in rows]
    right = [one == row["answer"] for one, row in zip(said, rows)]
    assert found["results"]["magnifierbench"]["magnifier_acc,none"] == sum(right) / len(right)
    assert any(right) and not all(right)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder where all tasks of our own look for their data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXATTN_DATA", str(tmp_path))
    return tmp_path


def test_rsvqa_is_what_a_loop_over_its_questions_gives(evaluate, yes_or_no, answer, data):
    rows = evaluation_data.write_rsvqa(data / "rsvqa_hrben")
    found = evaluate(f"pretrained={yes_or_no}", ["rsvqa_hrben"], batch_size=2, gen_kwargs="max_new_tokens=1")
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(row["category"], []).append(answer(row, row["question"] + SHORT) == row["answer"])
    metrics, shares = found["results"]["rsvqa_hrben"], {name: sum(own) / len(own) for name, own in right.items()}
    everything = [one for own in right.values() for one in own]
    assert metrics["rsvqa_acc,none"] == sum(everything) / len(everything) and 0 < sum(everything) < len(everything)
    assert {name: metrics[f"rsvqa_{name}_acc,none"] for name in shares} == shares
    assert metrics["rsvqa_mean_acc,none"] == sum(shares.values()) / 2


def test_refcoco_is_scored_by_the_size_of_the_object(evaluate, checkpoint, data, monkeypatch):
    """One answer to all: the box of 50 x 40 and that of 25 x 20 pixels overlap it by half or more."""
    from flexattn_cuda.evaluation import model

    rows, asked = evaluation_data.write_refcoco(data), []
    monkeypatch.setattr(model, "answer_text", lambda *_: "[0.1, 0.2, 0.5, 0.5]")
    monkeypatch.setattr(
        model.FlexAttn,
        "_prompt",
        lambda self, text, images, own=model.FlexAttn._prompt: asked.append(text) or own(self, text, images),
    )
    metrics = evaluate(f"pretrained={checkpoint}", ["refcoco_sizes"], batch_size=4)["results"]["refcoco_sizes"]
    wanted = [sentence for row in rows for sentence in row["answer"]]
    assert sorted(text.rpartition(": ")[2] for text in asked) == sorted(wanted)
    found = {name: metrics[f"refcoco_{name},none"] for name in ("acc", "large_acc", "small_acc")}
    assert found == {"acc": 1 / 4, "large_acc": 1.0, "small_acc": 0.0}


def test_gqa_maps_are_scored_by_layer(evaluate, checkpoint, data):
    from flexattn_cuda.evaluation import gqa
    from flexattn_cuda.mechanism.trace import Trace

    evaluation_data.write_gqa(data / "gqa_map")
    metrics = evaluate(f"pretrained={checkpoint},dtype=float64,max_new_tokens=2", ["gqa_map"], batch_size=3)["results"][
        "gqa_map"
    ]
    model, processor = load(checkpoint, device="cpu", dtype="float64")
    by_layer: dict[int, list[float]] = {}
    for row in gqa.read_rows(data / "gqa_map"):
        shown, trace = read_image(row["image"]), Trace(every_layer=True)
        inputs = processor(images=shown, text=processor.prompt(gqa.prompt(row)))
        model.generate(**inputs, max_new_tokens=1, do_sample=False, flexattn_trace=trace)
        for layer, traced in trace.steps[0].items():
            attention = traced.of_image(row=0, query=-1, image=0)[0].float().numpy()
            score = gqa.map_score(attention, processor.frame(*shown.size), shown.size, row["regions"])
            by_layer.setdefault(layer, []).append(score)
    assert len(by_layer) == model.config.text_config.num_hidden_layers
    for layer, scores in by_layer.items():
        assert metrics[f"gqa_map_layer_{layer:02d},none"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)


def test_an_image_is_encoded_once_for_all_its_questions(evaluate, yes_or_no, data, monkeypatch):
    """Ten questions about each of three images, in batches of four."""
    from flexattn_cuda.evaluation import model

    encoded = []
    original = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda *given: encoded.append(given[2]) or original(*given))
    evaluation_data.write_rsvqa(data / "rsvqa_hrben", kinds=("presence", "comp") * 15, per_image=10)
    evaluate(f"pretrained={yes_or_no}", ["rsvqa_hrben"], batch_size=4, gen_kwargs="max_new_tokens=1")
    assert len(encoded) == 3


# ----------------------------------------------------------------------------------------------------------- refusals


def made(checkpoint: Path, **options):
    from flexattn_cuda.evaluation.model import FlexAttn

    return FlexAttn(str(checkpoint), device="cpu", **options)


def asking(detail: Any, shown: Any = (), context: str = "Why?", doc: int = 0) -> SimpleNamespace:
    """A request about a document that shows this."""
    return SimpleNamespace(
        args=(context, detail, lambda _: shown, doc, "some_task", "test"), task_name="some_task", idx=0
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sytem": "hd"}, "--model_args has sytem; allowed: pretrained, adapter"),
        ({"system": "none"}, "system"),
        ({"batch_size": "auto"}, "--batch_size is auto; it must be a whole number"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"max_new_tokens": 0}, "max new tokens"),
    ],
)
def test_an_argument_of_the_model_is_refused(checkpoint, options, message):
    with pytest.raises(InputError, match=message):
        made(checkpoint, **options)


@pytest.mark.parametrize("name, value", [("temperature", 0.7), ("do_sample", True), ("num_beams", 4)])
def test_a_task_that_does_not_answer_greedily_is_refused(checkpoint, name, value):
    with pytest.raises(InputError, match=f"some_task asks for {name}={value}, .* pass --gen_kwargs {name}="):
        made(checkpoint).generate_until([asking({name: value})])


def test_a_document_that_shows_a_video_is_refused(checkpoint):
    model = made(checkpoint)
    model.task_dict = {"some_task": {"test": [None]}}
    with pytest.raises(InputError, match="document 0 of the task some_task shows a str"):
        model.generate_until([asking({}, ["video.mp4"])])


def test_a_task_of_several_rounds_is_refused(checkpoint):
    with pytest.raises(InputError, match="some_task has several rounds"):
        made(checkpoint).generate_until_multi_round([asking({})])


def test_an_answer_ends_before_the_first_stopping_sequence(checkpoint):
    model = made(checkpoint, max_new_tokens=12)
    model.task_dict = {"some_task": {"test": [None] * 2}}
    [whole] = model.generate_until([asking({})])
    stops = [whole[5], whole[3:5]]
    [cut, none] = model.generate_until([asking({"until": stops}), asking({"until": "no such text"}, doc=1)])
    assert cut == min((whole.partition(stop)[0].strip() for stop in stops), key=len) != whole
    assert none == whole


def test_questions_without_and_with_images_are_asked_together(checkpoint):
    model = made(checkpoint, batch_size=3, max_new_tokens=4)
    model.task_dict = {"some_task": {"test": [None] * 3}}
    shown = ([], [image()], [image(), image(96, 160)])
    requests = [asking({}, images, doc=number) for number, images in enumerate(shown)]
    together = model.generate_until(requests)
    assert together == [model.generate_until([one])[0] for one in requests]
    assert together[1] == ask(model.model, model.processor, image(), "Why?", max_new_tokens=4).text
